"""Failed rows of a run are labelled again by two commands: a real Ray, the embedded model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.controller import RunName
from cluster.corpus.table import build_error_table
from cluster.output.checks import ExpectedUnits
from cluster.output.commit import commit_unit
from cluster.output.run_output import RunOutput
from cluster.output.summary import Generation, summarise
from cluster.runs.labeller import Labeller, LabellerSettings
from cluster.runs.planning import plan_run
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import open_fleet
from cluster.serving.replica import VLMReplica
from cluster.store import open_store
from jobs import caption_corpus, labelling_cli, retry_errors
from jobs.make_corpus import make_corpus
from sppruner.models.loading import EMBEDDED, image_backend, load_processor, resolve_model
from tests.integration.checks import check_every_row_once, check_pruned, committed

ROWS = 300


def test_an_output_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert retry_errors.main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    places = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert caption_corpus.main([*places, "--retry-errors"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert caption_corpus.main(["--retry-errors"]) == 2
    assert "--retry-errors goes with --output" in capsys.readouterr().err


def commit_unreadable(corpus: str, labels: str) -> int:
    """Plans the job's run and commits one of its units as a node without the mount would."""
    parser = labelling_cli.build_parser(caption_corpus.JOB)
    options = parser.parse_args(["--input", corpus, "--output", labels])
    config = labelling_cli.build_config(caption_corpus.JOB, options, demo=False)
    model = resolve_model(EMBEDDED)
    output = RunOutput.open(labels)
    manifest = plan_run(
        config,
        output,
        model_revision=model.revision,
        image_backend=image_backend(load_processor(model)),
    )
    settings = LabellerSettings(
        name=RunName(manifest.run_id, labels),
        config=config,
        model_revision=model.revision,
        app="",
        deployment="",
    )

    async def label() -> None:
        labeller = Labeller(settings, VLMReplica(EngineSettings(model=EMBEDDED)))
        unit = manifest.units[-1]
        table = await labeller.label_unit(
            build_error_table(unit, manifest.mapping, "the mount is missing")
        )
        commit_unit(table, expected=ExpectedUnits.of(manifest), output=output, writer="w")

    asyncio.run(label())
    return manifest.units[-1].row_count


@pytest.mark.slow
def test_rows_of_a_node_without_the_mount_are_mended(
    serving: str, s3: str, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus, labels = f"{s3}/corpus", f"{s3}/labels"
    make_corpus(kind="caption", rows=ROWS, output=corpus)
    failed = commit_unreadable(corpus, labels)
    job = ["--input", corpus, "--output", labels]
    served = EngineSettings(model=EMBEDDED, revision=resolve_model(EMBEDDED).revision)
    with open_fleet(FleetSettings(engine=served)):
        assert caption_corpus.main([*job, "--retry-errors", "poison_row"]) == 5
        assert "no row to ask again" in capfd.readouterr().out
        assert caption_corpus.main(job) == 3
        before = {info.key: info.etag for info in open_store(labels).list(suffixes=(".parquet",))}
        assert retry_errors.main([labels, "--codes", "read_failed"]) == 0
        printed = capfd.readouterr().out
        assert f"{failed} failed rows of 1 units were asked again" in printed
        assert f"{failed} mended, 0 failed again" in printed
        assert caption_corpus.main([*job, "--retry-errors"]) == 0

    after = {info.key: info.etag for info in open_store(labels).list(suffixes=(".parquet",))}
    assert before.keys() == after.keys()
    assert sum(before[key] != after[key] for key in before) == 1
    rows = committed(labels)
    check_every_row_once(rows, ROWS)
    check_pruned(rows, tokens=144, kept=32)
    assert not any("#" in row["key"] for row in rows), "keys and columns are read again too"
    assert all(row["caption"] for row in rows)
    summary = summarise(labels)
    assert summary.generations == (Generation(number=1, units=1, asked=failed, mended=failed),)
    assert summary.total.rows == ROWS
    assert summary.total.visual_tokens_kept == sum(row["visual_tokens_kept"] for row in rows)
