"""An output folder is one table, for whatever reads folders of Parquet files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.ledger import UnitLedger
from cluster.output.run_output import RunOutput
from cluster.output.summary import keep_summary, summarise
from cluster.output.unit_names import UnitNames
from cluster.store import open_store
from tests.cluster.corpora import Planned, plan, put_parquet

Rows = list[dict[str, Any]]


def load_dataset(folder: str) -> Rows:
    loaded = datasets.load_dataset(folder, cache_dir=f"{folder}/../cache", split="train")
    return [dict(row) for row in loaded]


READERS: dict[str, Callable[[str], Rows]] = {
    "read_table": lambda folder: pq.read_table(folder).to_pylist(),
    "dataset": lambda folder: ds.dataset(folder).to_table().to_pylist(),
    "pandas": lambda folder: pa.Table.from_pandas(
        pd.read_parquet(folder, dtype_backend="pyarrow")
    ).to_pylist(),
    "load_dataset": load_dataset,
}


@pytest.fixture
def finished(tmp_path: Path) -> Planned:
    """A finished run of three units, with everything that a run writes."""
    images = pa.array([b"0", b"1", b"2"], pa.binary())
    put_parquet(open_store(f"{tmp_path}/in"), "a.parquet", pa.table({"image": images}))
    planned = plan(f"{tmp_path}/in", f"{tmp_path}/out", unit_rows=1)
    for number, unit in enumerate(planned.units):
        rows = pa.table(
            {
                "key": [f"k{number}"],
                "text": pa.array([None if number == 1 else "t"], pa.string()),
                "kept_tokens": pa.array([None if number == 1 else b"\xff\x01"], pa.binary()),
            }
        )
        ledger = UnitLedger(rows=1)
        assert planned.output.commit_unit(unit.unit_id, rows, ledger, writer="w")
    planned.output.keep_break_even(BreakEven(measured=None))
    planned.output.describe_data_files()
    keep_summary(planned.output, summarise(planned.output))
    return planned


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_is_read_as_its_rows_and_nothing_else(finished: Planned, reader: str) -> None:
    rows = READERS[reader](finished.output.uri)
    assert sorted(row["key"] for row in rows) == ["k0", "k1", "k2"]
    assert set(rows[0]) == {"key", "text", "kept_tokens"}
    by_key = {row["key"]: row for row in rows}
    assert (by_key["k0"]["text"], by_key["k0"]["kept_tokens"]) == ("t", b"\xff\x01")
    assert by_key["k1"]["text"] is None


def test_load_dataset_reads_the_units_of_the_run_beside_other_objects(finished: Planned) -> None:
    store = open_store(finished.output.uri)
    put_parquet(store, "other-run.parquet", pa.table({"key": ["stray"]}))
    store.put("notes.txt", b"of the user")
    assert {row["key"] for row in load_dataset(finished.output.uri)} == {"k0", "k1", "k2"}
    assert len(finished.output.foreign_objects({u.unit_id for u in finished.units})) == 2


def test_the_description_is_written_once_and_fits_the_layout(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    output = RunOutput(store, UnitNames(run_id="run", layout=1))
    output.describe_data_files()
    (config,) = yaml.safe_load(store.get(".huggingface.yaml"))["configs"]
    assert config["data_files"] == "*.parquet"
    store.put(".huggingface.yaml", b"of the user")
    output.describe_data_files()
    assert store.get(".huggingface.yaml") == b"of the user"


def test_the_description_that_an_older_run_left_is_replaced(tmp_path: Path) -> None:
    """`rm -r out/*` leaves hidden files."""
    store = open_store(tmp_path)
    for run_id in ("0123456789abcdef", "fedcba9876543210", "fedcba9876543210"):
        RunOutput(store, UnitNames(run_id=run_id)).describe_data_files()
        (config,) = yaml.safe_load(store.get(".huggingface.yaml"))["configs"]
        assert config["data_files"] == f"{run_id}-*.parquet"
    theirs = b"# rows of 0123456789abcdef-*.parquet, and more"
    store.put(".huggingface.yaml", theirs)
    RunOutput(store, UnitNames(run_id="0123456789abcdef")).describe_data_files()
    assert store.get(".huggingface.yaml") == theirs
