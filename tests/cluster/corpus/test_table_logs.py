"""Files of a table that has a log are not read as if all of them held its rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from cluster.errors import UsageError
from cluster.store import Store, open_store
from tests.cluster.corpora import plan, put_parquet, tar_bytes

ICEBERG = "metadata/00002-9c12d441-03fe-4693-9a96-a0705ddf69c1.metadata.json"


@pytest.fixture
def corpus(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "in"))


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def put_rows(corpus: Store, key: str) -> None:
    put_parquet(corpus, key, pa.table({"image": [b"jpeg"]}))


@pytest.mark.parametrize("folder", ["", "tables/one/"])
@pytest.mark.parametrize("log", ["00000000000000000000.json", "_last_checkpoint"])
def test_a_delta_table_is_refused_since_its_log_decides_which_files_are_rows(
    corpus: Store, output: str, folder: str, log: str
) -> None:
    put_rows(corpus, f"{folder}lang=en/part-0.parquet")
    corpus.put(f"{folder}_delta_log/{log}", b"{}")
    with pytest.raises(UsageError, match=r"/in.* is a table of Delta Lake.*export it to plain"):
        plan(corpus.uri, output)


def test_a_delta_table_whose_log_begins_with_a_checkpoint_is_refused(
    corpus: Store, output: str
) -> None:
    put_rows(corpus, "part-0.parquet")
    put_rows(corpus, "_delta_log/00000000000000000010.checkpoint.parquet")
    with pytest.raises(UsageError, match="a table of Delta Lake"):
        plan(corpus.uri, output)


@pytest.mark.parametrize(
    "log", [ICEBERG, "metadata/v3.metadata.json", "metadata/v3.gz.metadata.json"]
)
def test_an_iceberg_table_is_refused_since_its_log_decides_which_files_are_rows(
    corpus: Store, output: str, log: str
) -> None:
    put_rows(corpus, "db/table/data/00000-0-x.parquet")
    corpus.put(f"db/table/{log}", b"{}")
    with pytest.raises(UsageError, match=r"/in/db/table is a table of Iceberg"):
        plan(corpus.uri, output)


def test_a_log_beside_other_files_or_of_another_folder_refuses_nothing(
    corpus: Store, output: str
) -> None:
    put_rows(corpus, "data/train.parquet")
    corpus.put("metadata/croissant.metadata.json", b"{}")
    corpus.put("data/v1.metadata.json", b"{}")
    corpus.put("other/_delta_log/00000000000000000000.json", b"{}")
    corpus.put("elsewhere/metadata/v1.metadata.json", b"{}")
    assert plan(corpus.uri, output).manifest.rows == 1


def test_tars_beside_a_table_are_read(corpus: Store, output: str) -> None:
    put_rows(corpus, "part-0.parquet")
    corpus.put("_delta_log/00000000000000000000.json", b"{}")
    corpus.put("a.tar", tar_bytes([("a.jpg", b"j")]))
    assert plan(corpus.uri, output, format="webdataset").manifest.rows == 1
