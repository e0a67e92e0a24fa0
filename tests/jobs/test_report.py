"""The report's pictures: each shows the kept tokens that its row records, or is not drawn."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.controller import RunName
from cluster.corpus.source import read_unit
from cluster.images import decode_image
from cluster.output.audit import Audit
from cluster.output.checks import ExpectedUnits
from cluster.output.commit import commit_unit
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.output.unit_audit import Difference
from cluster.runs.labeller import Labeller, LabellerSettings
from cluster.runs.planning import plan_run
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.replica import VLMReplica
from cluster.store import open_store
from jobs import report
from sppruner import Budget, Pruner, PruneSpec
from sppruner.engine import SamplingParams
from sppruner.evaluation import drawn_scenes
from sppruner.models.jpeg_scaling import jpeg_scale_of
from sppruner.models.loading import EMBEDDED, load_model, resolve_model
from sppruner.pictures.geometry import visible_crop
from sppruner.pictures.overlay import overlay
from sppruner.pictures.selections import prepare_image
from sppruner.spec import DENSE
from tests.cluster.corpora import config, put_parquet

SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.222))
# The first and the last have the same file name; the third is that name with a number after it.
KEYS = ["a/b", "broken", "a-b-2", "a-b"]
QUESTIONS = ["what color is the circle ?", "is there a star ?", "how many objects ?", "is it red ?"]


@functools.cache
def scenes() -> list[bytes]:
    images: list[bytes] = []
    for item in drawn_scenes(40).items:
        buffer = io.BytesIO()
        # Large enough for reduced decoding on a replica, which the picture must reproduce.
        item.image().resize((768, 768)).save(buffer, "JPEG", quality=90)
        if buffer.getvalue() not in images:
            images.append(buffer.getvalue())
    return images[: len(KEYS)]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed run of two units, one of its rows faulty."""
    folder = tmp_path_factory.mktemp("run")
    images = [
        b"junk" if key == "broken" else data for key, data in zip(KEYS, scenes(), strict=True)
    ]
    corpus = pa.table({"key": KEYS, "image": pa.array(images, pa.binary()), "question": QUESTIONS})
    put_parquet(open_store(str(folder / "corpus")), "x.parquet", corpus)
    run = config(
        str(folder / "corpus"),
        str(folder / "labels"),
        kind="vqa",
        model=EMBEDDED,
        prompt="look: {question}",
        spec=SPEC,
        generation=SamplingParams(max_new_tokens=2),
        unit_rows=2,
    )
    revision = resolve_model(EMBEDDED).revision
    labels = RunOutput.open(run.output)
    plan = plan_run(run, labels, model_revision=revision, image_backend="pil")
    settings = LabellerSettings(
        name=RunName(plan.run_id, labels.uri),
        config=run,
        model_revision=revision,
        app="",
        deployment="",
    )

    async def label() -> list[pa.Table]:
        labeller = Labeller(settings, VLMReplica(EngineSettings(model=EMBEDDED)))
        source = open_store(plan.source)
        tables = [read_unit(source, unit, plan.mapping) for unit in plan.units]
        return [await labeller.label_unit(table) for table in tables]

    for table in asyncio.run(label()):
        commit_unit(table, expected=ExpectedUnits.of(plan), output=labels, writer="w")
    return folder / "labels"


@pytest.fixture
def copy(output: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(output, tmp_path / "labels"))


def mark_dense(labels: Path) -> None:
    """Commits every row as if it were dense."""
    for path in labels.glob("*.parquet"):
        ledger = pq.read_metadata(path).metadata[b"sppruner.ledger"]
        table = pq.read_table(path).replace_schema_metadata({b"sppruner.ledger": ledger})
        specs = [json.dumps(DENSE.to_dict())] * len(table)
        column = table.column_names.index("prune_spec")
        pq.write_table(table.set_column(column, "prune_spec", pa.array(specs)), path)


def change(labels: Path, **settings: Any) -> None:
    """Rewrites parts of the manifest; the units become those of the run that it then describes."""
    manifest = json.loads((labels / "_run/manifest.json").read_text())
    for name, value in settings.items():
        part = manifest if name in manifest else manifest["settings"]
        assert name in part or name == "dtype", "which a run has if it was set"
        part[name] = value
    text = json.dumps(manifest)
    (labels / "_run/manifest.json").write_text(text)
    run_id = Manifest.from_json(text.encode()).run_id
    for path in labels.glob("*.parquet"):
        ledger = pq.read_metadata(path).metadata[b"sppruner.ledger"]
        table = pq.read_table(path).replace_schema_metadata({b"sppruner.ledger": ledger})
        column = table.column_names.index("run_id")
        table = table.set_column(column, "run_id", pa.array([run_id] * len(table)))
        path.unlink()
        pq.write_table(table, labels / f"{run_id}-{path.name.partition('-')[2]}")


def rewrite(labels: Path, key: str, mask: bytes | None) -> None:
    """Commits another mask for one row; None drops the whole column."""
    for path in labels.glob("*.parquet"):
        ledger = pq.read_metadata(path).metadata[b"sppruner.ledger"]
        table = pq.read_table(path).replace_schema_metadata({b"sppruner.ledger": ledger})
        column = table.column_names.index("kept_tokens")
        if mask is None:
            pq.write_table(table.remove_column(column), path)
            continue
        masks = [mask if r["key"] == key else r["kept_tokens"] for r in table.to_pylist()]
        pq.write_table(table.set_column(column, "kept_tokens", pa.array(masks, pa.binary())), path)


def draw(labels: Path, folder: Path, *options: str) -> int:
    return report.main([str(labels), "--overlay", str(folder), *options])


def read_errors(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_each_labelled_row_is_drawn_with_its_kept_tokens(output: Path, tmp_path: Path) -> None:
    assert draw(output, tmp_path / "new" / "seen") == 0
    seen = {path.name: Image.open(path) for path in (tmp_path / "new" / "seen").iterdir()}
    names = ["0000-a-b.png", "0001-a-b-2.png", "0002-a-b.png"]
    assert sorted(seen) == names, "one per labelled row, without the faulty one"
    loaded = load_model(EMBEDDED)
    pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
    limits = config("in", "out").media
    for name, row in zip(names, (0, 2, 3), strict=True):
        image = decode_image(scenes()[row], limits, jpeg_scale_of(loaded.processor))
        prompt = f"look: {QUESTIONS[row]}"
        prepared = prepare_image(pruner, loaded.processor, image, prompt, SPEC)
        view = visible_crop(image, loaded.processor.image_processor)
        expected = overlay(view, prepared.selections)
        assert np.array_equal(np.asarray(seen[name]), np.asarray(expected))


def test_rows_limits_the_pictures_but_not_the_report(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(output, tmp_path, "--rows", "1", "--json") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["0000-a-b.png"]
    assert json.loads(capsys.readouterr().out)["rows"] == len(KEYS)


def test_a_row_that_records_other_tokens_is_not_drawn(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same number of tokens, so that a count alone would not notice."""
    rewrite(copy, "a-b", ((1 << 32) - 1).to_bytes(18, "little"))
    assert draw(copy, tmp_path / "seen") == 1
    assert "row 'a-b': selecting again" in read_errors(capsys)
    assert not (tmp_path / "seen" / "0002-a-b.png").exists()


def test_a_half_precision_row_is_drawn_as_recorded_with_a_warning(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounding in a batch can swap tokens of nearly equal scores."""
    rewrite(copy, "a-b", ((1 << 32) - 1).to_bytes(18, "little"))
    change(copy, dtype="bfloat16")
    assert draw(copy, tmp_path / "seen") == 0
    assert "overlay_as_told" in (errors := read_errors(capsys))
    assert "a-b" in errors
    picture = np.asarray(Image.open(tmp_path / "seen" / "0002-a-b.png")).astype(int)
    grey = (np.ptp(picture[:480], axis=2) == 0).reshape(12, 40, 12, 40).all(axis=(1, 3))
    # The first 32 of 12 × 12 tokens: two whole rows and two thirds of a third.
    assert grey[3:].all(), "tokens that the row does not record as kept"
    assert not grey.flatten()[:32].any(), "each kept token has an outline"


@pytest.mark.parametrize("mask", [((1 << 33) - 1).to_bytes(18, "little"), b"\xff" * 4])
def test_another_number_of_tokens_is_refused_in_half_precision_too(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mask: bytes
) -> None:
    """More tokens than were kept, or as many of a smaller image."""
    rewrite(copy, "a-b", mask)
    change(copy, dtype="bfloat16")
    assert draw(copy, tmp_path / "seen") == 1
    assert "row 'a-b': selecting again" in read_errors(capsys)


def test_a_dense_run_has_nothing_to_draw(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark_dense(copy)
    assert draw(copy, tmp_path / "seen") == 2
    assert "row 'a/b' was labelled with every token: nothing to draw" in read_errors(capsys)


def test_missing_images_models_and_masks_are_named(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = json.loads((copy / "_run/manifest.json").read_text())["source"]
    change(copy, source=str(tmp_path / "moved"))
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/other").touch()
    assert draw(copy, tmp_path / "seen") == 2
    assert f"row 'a/b': its image cannot be read again from {tmp_path / 'moved'}" in read_errors(
        capsys
    )
    change(copy, source=source, model="no/such-model")
    assert draw(copy, tmp_path / "seen") == 2
    assert "the run's model is needed to draw its rows: no model 'no/such-model'" in read_errors(
        capsys
    )
    change(copy, model=EMBEDDED, model_revision="0" * 16)
    assert draw(copy, tmp_path / "seen") == 2
    assert "its files were changed" in read_errors(capsys)
    rewrite(copy, "a-b", None)
    assert draw(copy, tmp_path / "seen") == 2
    assert "do not say which tokens were kept" in read_errors(capsys)
    for path in copy.glob("*.parquet"):
        path.unlink()
    assert draw(copy, tmp_path / "seen") == 2
    assert "no labelled row yet" in read_errors(capsys)
    assert not any((tmp_path / "seen").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "3"], "--rows goes with --overlay"),
        (["--overlay", "x", "--rows", "0"], "give at least 1"),
        (["--overlay", __file__], "not a folder to write to"),
        (["--overlay", "x", "--audit"], "--audit draws no pictures"),
        (["--price-per-hour", "inf"], "give a price above 0"),
        (["--price-per-hour", "nan"], "give a price above 0"),
        (["--price-per-hour", "-1"], "give a price above 0"),
        (["--price-per-hour", "1", "--json"], "goes with the report"),
        (["--price-per-hour", "1", "--audit"], "goes with the report"),
    ],
)
def test_bad_options_are_named(
    output: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(output), *options]) == 2
    assert message in read_errors(capsys)


@pytest.mark.parametrize(
    ("open_units", "what", "code", "printed"),
    [
        (0, [], 0, ["7 units, 28 rows, 0 differences"]),
        (
            2,
            [],
            5,
            ["not ended: 2 of 9 units are not committed", "7 units, 28 rows, 0 differences"],
        ),
        (0, ["its rows 3"], 1, ["u1: its rows 3", "7 units, 28 rows, 1 differences"]),
    ],
)
def test_an_audit_says_what_differs_and_ends_with_the_sum(
    open_units: int,
    what: list[str],
    code: int,
    printed: list[str],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    differences = tuple(Difference(where="u1", what=each) for each in what)
    found = Audit(units=7, rows=28, differences=differences, open=open_units)
    monkeypatch.setattr(report, "audit", lambda _: found)
    assert report.main([str(output), "--audit"]) == code
    assert capsys.readouterr().out.splitlines() == printed
