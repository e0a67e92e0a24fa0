"""The drawn corpus: reproducible, held out, in standard formats, faulty only where listed."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import Kind, MediaLimits
from cluster.corpus.unit import Format
from cluster.demo import CUT_BYTES
from cluster.errors import RowError
from cluster.images import decode_image
from jobs.make_corpus import FILE_ROWS, main, make_corpus
from sppruner.tiny.scenes import HELD_OUT_SEED


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def outcome(data: bytes | None) -> str | None:
    try:
        decode_image(data, MediaLimits())
    except RowError as error:
        return error.code
    return None


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
@pytest.mark.parametrize("kind", ["caption", "vqa"])
def test_equal_arguments_give_equal_corpora(tmp_path: Path, kind: Kind, format: Format) -> None:
    for name in ("one", "two"):
        uri = str(tmp_path / name)
        make_corpus(kind=kind, rows=30, output=uri, format=format, faults=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_different_seeds_give_different_held_out_scenes(tmp_path: Path) -> None:
    keys: list[set[str]] = []
    for seed in (0, 1):
        make_corpus(kind="caption", rows=20, output=str(tmp_path / str(seed)), seed=seed)
        keys.append(set(pq.read_table(tmp_path / str(seed))["key"].to_pylist()))
    assert not keys[0] & keys[1]
    assert all(int(key.removeprefix("scene-")) >= HELD_OUT_SEED for key in keys[0] | keys[1])


def test_parquet_is_shaped_like_a_hugging_face_dataset(tmp_path: Path) -> None:
    make_corpus(kind="vqa", rows=FILE_ROWS + 6, output=str(tmp_path))
    first = pq.ParquetFile(tmp_path / "00000.parquet")
    assert first.metadata.num_rows == FILE_ROWS
    assert first.metadata.row_group(0).num_rows == 256
    schema = first.schema_arrow
    image = schema.field("image").type
    assert [image.field(n).name for n in range(image.num_fields)] == ["bytes", "path"]
    assert schema.field("answers").type.value_type == pa.string()
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    assert features["image"] == {"_type": "Image"}
    table = pq.read_table(tmp_path)
    assert table.num_rows == FILE_ROWS + 6
    assert all(outcome(image["bytes"]) is None for image in table["image"].to_pylist()[:20])


def test_webdataset_members_of_a_key_are_consecutive(tmp_path: Path) -> None:
    make_corpus(kind="caption", rows=3, output=str(tmp_path), format="webdataset")
    with tarfile.open(tmp_path / "00000.tar") as archive:
        names = archive.getnames()
        reference = archive.extractfile(names[2])
        record = archive.extractfile(names[1])
        assert reference is not None
        assert record is not None
        assert json.load(record)["caption"] == reference.read().decode()
    key = f"scene-{HELD_OUT_SEED}"
    assert names[:3] == [f"{key}.jpg", f"{key}.json", f"{key}.txt"]


@pytest.mark.parametrize("kind", ["caption", "vqa"])
def test_every_planted_fault_is_present_and_nothing_else_is_faulty(
    tmp_path: Path, kind: Kind
) -> None:
    faults = make_corpus(kind=kind, rows=200, output=str(tmp_path), faults=True, seed=3)
    names = {fault.fault for fault in faults}
    expected = {"corrupt_jpeg", "truncated_jpeg", "empty_image", "html_image", "image_bomb"}
    expected |= {"no_image", "duplicate_key", "odd_key", "long_key"}
    assert names == expected | ({"no_question"} if kind == "vqa" else set())
    rows = pq.read_table(tmp_path / "00000.parquet").to_pylist()
    by_row = {fault.row: fault for fault in faults}
    for number, row in enumerate(rows):
        found = outcome(row["image"] and row["image"]["bytes"])
        if kind == "vqa" and row["question"] is None:
            found = "prompt_invalid"
        fault = by_row.get(number)
        assert found == (fault.error_code if fault else None)
        assert fault is None or fault.key == row["key"]
    listed = json.loads((tmp_path / "_faults.json").read_bytes())
    assert [fault["row"] for fault in listed] == [fault.row for fault in faults]
    assert max(len(row["key"]) for row in rows) == 4096


def test_the_last_archive_is_truncated_within_one_more_row(tmp_path: Path) -> None:
    uri = str(tmp_path)
    faults = make_corpus(kind="caption", rows=40, output=uri, format="webdataset", faults=True)
    cut = (tmp_path / "00000.tar").stat().st_size - CUT_BYTES
    assert (faults[-1].row, faults[-1].key) == (40, f"00000.tar@{cut}")
    with pytest.raises(tarfile.ReadError), tarfile.open(tmp_path / "00000.tar") as archive:
        archive.extractall(tmp_path / "x", filter="data")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = str(tmp_path / "corpus")
    assert main(["--kind", "caption", "--rows", "4", "--output", uri, "--faults"]) == 0
    assert "planted" in capsys.readouterr().out
    assert main(["--kind", "caption", "--rows", "4", "--output", uri]) == 2
    assert "give an empty --output" in capsys.readouterr().err
    assert main(["--kind", "vqa", "--rows", "0", "--output", str(tmp_path / "other")]) == 2
