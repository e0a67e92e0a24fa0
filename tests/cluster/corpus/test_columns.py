"""Which column is what: by name, by content, or as the user says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import UsageError
from cluster.store import Store, open_store
from tests.cluster.corpora import image, plan, put_parquet, read_all, tar_bytes

JPEG = b"\xff\xd8\xff\xe0 jpeg"
HASH = bytes(range(32))


@pytest.fixture
def corpus(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "in"))


def mapping_of(corpus: Store, tmp_path: Path, columns: dict[str, Any], **settings: Any) -> Any:
    put_parquet(corpus, "a.parquet", pa.table(columns))
    return plan(corpus.uri, str(tmp_path / "out"), **settings).manifest.mapping


def test_the_column_that_holds_images_is_found_beside_hashes(corpus: Store, tmp_path: Path) -> None:
    columns = {"sha256": [HASH, HASH], "scan": [None, JPEG], "other": pa.nulls(2, pa.binary())}
    assert mapping_of(corpus, tmp_path, columns).image == "scan"


@pytest.mark.parametrize(
    "magic",
    [
        b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM..", b"II*\0", b"MM\0*", b"RIFF....WEBPVP8 ",
        b"\0\0\0\x20ftypavif", b"\0\0\0\x18ftypheic",
    ],
)  # fmt: skip
def test_images_are_known_by_how_they_begin(corpus: Store, tmp_path: Path, magic: bytes) -> None:
    columns = {"sha256": [HASH], "scan": [magic + b"rest"]}
    assert mapping_of(corpus, tmp_path, columns).image == "scan"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [HASH], "b": [HASH]}, r"none of the binary columns a, b holds images"),
        ({"a": [JPEG], "b": [JPEG]}, r"several of the binary columns a, b hold images"),
        ({"a": [b"RIFF....WAVE"]}, r"none of the binary columns a holds images"),
        ({"a": pa.array([], pa.binary())}, r"none of the binary columns|without a single row"),
    ],
)
def test_what_could_be_several_columns_or_none_is_refused_with_the_flag(
    corpus: Store, tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        mapping_of(corpus, tmp_path, columns)


def test_named_columns_are_used(corpus: Store, tmp_path: Path) -> None:
    columns = {"image": [image()], "scan": [JPEG], "id": [1], "code": ["c"], "ask": ["what?"]}
    chosen = {"image_column": "scan", "key_column": "code", "question_column": "ask"}
    put_parquet(corpus, "a.parquet", pa.table(columns))
    planned = plan(corpus.uri, str(tmp_path / "out"), kind="vqa", prompt="{question}", **chosen)
    mapping = planned.manifest.mapping
    assert (mapping.image, mapping.key, mapping.question) == ("scan", "code", "ask")
    (row,) = read_all(planned).to_pylist()
    assert (row["_in_image"], row["_in_key"], row["_in_prompt"]) == (JPEG, "c", "what?")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_column": "note"}, "--image-column note is no column of encoded images"),
        ({"key_column": "absent"}, "--key absent is no column of strings or integers"),
        ({"question_column": "n"}, "--question-column n is no column of strings"),
        ({}, "name yours with --question-column"),
    ],
)
def test_columns_that_cannot_be_what_they_are_named_for_are_refused(
    corpus: Store, tmp_path: Path, setting: dict[str, str], message: str
) -> None:
    columns = {"image": [image()], "note": ["x"], "n": [1]}
    with pytest.raises(UsageError, match=message):
        mapping_of(corpus, tmp_path, columns, kind="vqa", prompt="{question}", **setting)


def test_columns_cannot_be_named_in_tars(corpus: Store, tmp_path: Path) -> None:
    corpus.put("a.tar", tar_bytes([("a.jpg", JPEG)]))
    with pytest.raises(UsageError, match=r"tars: --image-column, --key and --question-column"):
        plan(corpus.uri, str(tmp_path / "out"), key_column="id")
