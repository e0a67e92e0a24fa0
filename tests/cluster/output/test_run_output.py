"""The output of a run: its keys are a contract, and objects that are not a run's are refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.ledger import UnitLedger
from cluster.accounting.speedup import MeasuredRatio
from cluster.errors import StoreError, UsageError
from cluster.output.run_output import RunOutput
from cluster.store import Store, open_store
from tests.cluster.corpora import image, plan, put_parquet


@pytest.fixture
def store(s3: str) -> Store:
    return open_store(f"{s3}/out")


@pytest.fixture
def output(store: Store) -> RunOutput:
    return RunOutput(store)


ROWS = pa.table({"key": ["a", "b"], "text": ["x", None]})


def test_the_keys_of_an_output_are_fixed(tmp_path: Path) -> None:
    """Runs of earlier versions are resumed and read by these keys."""
    put_parquet(open_store(f"{tmp_path}/in"), "a.parquet", pa.table({"image": [image()["bytes"]]}))
    _, output = plan(f"{tmp_path}/in", f"{tmp_path}/out")
    output.commit_unit("u1", ROWS, UnitLedger(rows=2), writer="w")
    output.keep_break_even(BreakEven(measured=None))
    output.put_summary("{}")
    keys = {info.key for info in open_store(f"{tmp_path}/out").list()}
    assert keys == {
        "u1.parquet",
        "_run/manifest.json",
        "_run/break-even.json",
        "_run/summary.json",
    }
    assert pq.read_table(f"{tmp_path}/out").to_pylist() == ROWS.to_pylist()


def test_a_unit_is_read_whole_or_by_column(output: RunOutput) -> None:
    assert output.commit_unit("u1", ROWS, UnitLedger(rows=2), writer="w")
    assert output.committed_units() == {"u1"}
    assert output.unit_columns("u1") == ["key", "text"]
    assert output.read_unit("u1").to_pylist() == ROWS.to_pylist()
    assert output.read_unit("u1", ["text"]).to_pydict() == {"text": ["x", None]}


def test_a_column_that_a_unit_lacks_is_no_damage(output: RunOutput) -> None:
    """The advice for a damaged object is to remove it: never where the reader is at fault."""
    output.commit_unit("u1", ROWS, UnitLedger(rows=2), writer="w")
    with pytest.raises(UsageError, match=r"has no column \['capton'\], only \['key', 'text'\]"):
        output.read_unit("u1", ["text", "capton"])


def test_the_first_of_two_writers_commits_the_unit(output: RunOutput) -> None:
    assert output.commit_unit("u1", ROWS, UnitLedger(rows=2), writer="first")
    assert not output.commit_unit("u1", ROWS.slice(0, 1), UnitLedger(rows=1), writer="second")
    assert output.ledgers(["u1"]) == [UnitLedger(rows=2)]


@pytest.mark.parametrize("units", [3, 40])
def test_ledgers_are_returned_in_the_requested_order(output: RunOutput, units: int) -> None:
    """A few units take one request each, many units one listing."""
    names = [f"u{number}" for number in range(units)]

    def commit(number: int) -> bool:
        ledger = UnitLedger(rows=number)
        return output.commit_unit(f"u{number}", ROWS, ledger, writer=str(number))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(commit, range(units)))
    assert [ledger.rows for ledger in output.ledgers(names[::-1])] == list(range(units))[::-1]
    with pytest.raises(StoreError, match=r"u999\.parquet: this unit is not committed"):
        output.ledgers([*names, "u999"])


def test_objects_that_are_not_units_are_refused_by_name(output: RunOutput, store: Store) -> None:
    put_parquet(store, "u1.parquet", pa.table({"x": [1]}))
    store.put("u2.parquet", b"not parquet")
    with pytest.raises(StoreError, match=r"u1\.parquet: no ledger"):
        output.ledgers(["u1"])
    with pytest.raises(StoreError, match=r"u2\.parquet: not a Parquet file"):
        output.ledgers(["u2"])
    with pytest.raises(StoreError, match=r"u3\.parquet: this unit is not committed"):
        output.ledgers(["u3"])


def test_damage_anywhere_in_an_output_names_the_object(output: RunOutput, store: Store) -> None:
    table = pa.table({"key": [f"row {number}" for number in range(4000)], "text": ["x"] * 4000})
    assert output.commit_unit("u1", table, UnitLedger(rows=4000), writer="w")
    data = bytearray(store.get("u1.parquet"))
    data[200:1200] = bytes(1000)
    store.put("u1.parquet", bytes(data))
    with pytest.raises(StoreError, match=r"u1\.parquet.*remove it and resume"):
        output.read_unit("u1")
    store.put("_run/break-even.json", b'{"cho')
    with pytest.raises(StoreError, match=r"break-even\.json.*remove it"):
        output.break_even()


def test_a_ledger_of_another_version_is_named(output: RunOutput, store: Store) -> None:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, ROWS.schema) as writer:
        writer.write_table(ROWS)
        writer.add_key_value_metadata({"sppruner.ledger": '{"rows": 2, "of_tomorrow": 1}'})
    store.put("u9.parquet", sink.getvalue().to_pybytes())
    with pytest.raises(StoreError, match=r"u9\.parquet: not a ledger this version can read"):
        output.ledgers(["u9"])


def test_a_prefix_without_a_run_has_no_manifest_and_requiring_one_is_a_usage_error(
    output: RunOutput,
) -> None:
    assert output.manifest() is None
    assert output.first_parquet_object() is None
    with pytest.raises(UsageError, match=r"holds no run \(no _run/manifest\.json\)"):
        output.require_manifest()


def test_the_first_break_even_decision_is_kept(output: RunOutput) -> None:
    measured = MeasuredRatio(ratio=2.0, low=1.5, high=2.5, rows=8, batches=3)
    first, second = BreakEven(measured=measured), BreakEven(measured=None)
    assert output.break_even() is None
    assert output.keep_break_even(first) == first
    assert output.keep_break_even(second) == first
    assert output.break_even() == first


def test_a_summary_is_replaced(output: RunOutput, store: Store) -> None:
    assert not output.has_summary()
    output.put_summary("{}")
    output.put_summary('{"rows": 1}')
    assert output.has_summary()
    assert store.get("_run/summary.json") == b'{"rows": 1}'
