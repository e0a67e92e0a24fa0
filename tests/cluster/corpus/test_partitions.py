"""Columns in the names of folders."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from cluster.corpus.partitions import partition_schema, partition_values
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
