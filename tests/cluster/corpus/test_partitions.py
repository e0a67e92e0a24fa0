"""Columns in the names of folders."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.config import Kind
from cluster.corpus.columns import _IMAGE_COLUMNS, KEY_COLUMNS, QUESTION_COLUMNS
from cluster.corpus.partitions import partition_schema, partition_values
from cluster.errors import UsageError
from cluster.schema import OUTPUT_FIELDS, VQA_FIELDS
from cluster.store import open_store
from tests.cluster.corpora import image, plan, put_parquet, read_all


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("a.parquet", {}),
        ("lang=en/year=2024/a.parquet", {"lang": "en", "year": "2024"}),
        ("x/lang=a%20b%2Fc/a=b.parquet", {"lang": "a b/c"}),
        ("lang=__HIVE_DEFAULT_PARTITION__/a.parquet", {"lang": None}),
        ("=x/lang=/a.parquet", {"lang": ""}),
    ],
)
def test_values_are_read_from_folders(key: str, values: dict[str, str | None]) -> None:
    assert partition_values(key) == values


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-20"], pa.int64()),
        (["1", "x"], pa.string()),
        (["007"], pa.string()),
        (["9" * 30], pa.string()),
        (["__HIVE_DEFAULT_PARTITION__", "3"], pa.int64()),
        (["__HIVE_DEFAULT_PARTITION__"], pa.string()),
    ],
)
def test_integers_are_columns_of_integers(values: list[str], kind: pa.DataType) -> None:
    keys = [f"n={value}/a.parquet" for value in values]
    assert partition_schema(keys) == pa.schema([("n", kind)])


def test_partitions_are_committed_as_columns_and_a_column_of_the_file_wins(tmp_path: Path) -> None:
    corpus = open_store(str(tmp_path / "in"))
    for lang, split, year in (("de", "train", 2023), ("en", "test", 2024)):
        key = f"lang={lang}/_split={split}/year={year}/a.parquet"
        put_parquet(corpus, key, pa.table({"image": [image()] * 2, "lang": ["file's"] * 2}))
    put_parquet(corpus, "b.parquet", pa.table({"image": [image()], "lang": ["b"]}))
    read = read_all(plan(corpus.uri, str(tmp_path / "out")))
    assert read["lang"].to_pylist() == ["b"] + ["file's"] * 4
    assert read["_split"].to_pylist() == [None, "train", "train", "test", "test"]
    assert read["year"].to_pylist() == [None, 2023, 2023, 2024, 2024]


SPECIAL = sorted(
    {name for names in KEY_COLUMNS.values() for name in names}
    | {*QUESTION_COLUMNS, *_IMAGE_COLUMNS, "lang", "_in_key"}
    | {field.name for field in (*OUTPUT_FIELDS, *VQA_FIELDS)}
)


@pytest.mark.parametrize("kind", ["caption", "vqa"])
@pytest.mark.parametrize("name", [*SPECIAL, "Key", "IMAGE"])
def test_a_folders_value_is_a_column_of_its_rows_whatever_its_name(
    tmp_path: Path, name: str, kind: Kind
) -> None:
    """It tells no row of a file from the others, so it is no key, question or image."""
    corpus = open_store(str(tmp_path / "in"))
    for value in ("abc", "de f"):
        columns = {"scan": [image()] * 2, "ask": ["what?"] * 2}
        put_parquet(corpus, f"{name}={value}/a.parquet", pa.table(columns))
    put_parquet(corpus, "b.parquet", pa.table({"scan": [image()], "ask": ["what?"]}))
    asked = {"question_column": "ask", "prompt": "{question}"} if kind == "vqa" else {}
    planned = plan(corpus.uri, str(tmp_path / "out"), kind=kind, image_column="scan", **asked)
    read = read_all(planned)
    keys = [f"{name}={value}/a.parquet#{row}" for value in ("abc", "de f") for row in (0, 1)]
    rows = dict(zip(read["_in_key"].to_pylist(), read.to_pylist(), strict=True))
    assert rows.keys() == {*keys, "b.parquet#0"}
    committed = dict(planned.manifest.mapping.columns)[name]
    assert [rows[key][committed] for key in keys] == ["abc", "abc", "de f", "de f"]
    assert rows["b.parquet#0"][committed] is None
    assert read["_in_error_code"].to_pylist() == [None] * 5


@pytest.mark.parametrize("flag", ["key_column", "question_column", "image_column"])
def test_a_folders_column_cannot_be_named_as_key_question_or_image(
    tmp_path: Path, flag: str
) -> None:
    corpus = open_store(str(tmp_path / "in"))
    put_parquet(corpus, "lang=en/a.parquet", pa.table({"image": [image()], "question": ["q"]}))
    with pytest.raises(UsageError, match=r"lang is no column of"):
        plan(corpus.uri, str(tmp_path / "out"), kind="vqa", prompt="{question}", **{flag: "lang"})


def test_keys_that_some_files_have_in_themselves_and_some_in_their_folders_are_all_committed(
    tmp_path: Path,
) -> None:
    corpus = open_store(str(tmp_path / "in"))
    put_parquet(corpus, "key=abc/a.parquet", pa.table({"image": [image()]}))
    put_parquet(corpus, "key=abc/b.parquet", pa.table({"image": [image()], "key": ["k"]}))
    read = read_all(plan(corpus.uri, str(tmp_path / "out")))
    assert read["_in_key"].to_pylist() == ["key=abc/a.parquet#0", "k"]
    assert read["source_key"].to_pylist() == ["abc", "k"]


@pytest.mark.parametrize(
    ("value", "column", "read"),
    [
        ("7", pa.array([1]), [7, 1]),
        ("7", pa.array(["x"]), ["7", "x"]),
        ("2024-01-02", pa.array([date(2023, 1, 1)]), [date(2024, 1, 2), date(2023, 1, 1)]),
    ],
)
def test_a_folders_value_is_of_the_type_that_the_column_has_in_files(
    tmp_path: Path, value: str, column: pa.Array, read: list[object]
) -> None:
    corpus = open_store(str(tmp_path / "in"))
    put_parquet(corpus, f"n={value}/a.parquet", pa.table({"image": [image()]}))
    put_parquet(corpus, "z.parquet", pa.table({"image": [image()], "n": column}))
    assert read_all(plan(corpus.uri, str(tmp_path / "out")))["n"].to_pylist() == read


def test_a_folders_value_that_the_column_of_files_cannot_hold_is_refused(tmp_path: Path) -> None:
    corpus = open_store(str(tmp_path / "in"))
    put_parquet(corpus, "n=x/a.parquet", pa.table({"image": [image()]}))
    put_parquet(corpus, "n=y/b.parquet", pa.table({"image": [image()], "n": [1]}))
    with pytest.raises(UsageError, match=r"n=x/a\.parquet: 'n' in the folder's name is no int64"):
        plan(corpus.uri, str(tmp_path / "out"))
