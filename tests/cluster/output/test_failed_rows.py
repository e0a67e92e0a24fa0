"""Which failed rows are asked again."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from cluster.accounting.ledger import UnitLedger
from cluster.corpus.packed import pack_unit, unpack_units
from cluster.corpus.source import read_unit
from cluster.errors import RowError, UsageError
from cluster.output.failed_rows import (
    ErrorChoice,
    asked_by_default,
    find_failed_rows,
    select_rows,
)
from cluster.store import open_store
from sppruner.errors import EngineError, SpprunerError
from tests.cluster.corpora import Planned, plan, put_parquet

ERRORS: list[list[tuple[str, str] | None]] = [
    [None, ("inference_failed", "infer"), ("image_undecodable", "decode")],
    [None, None, None],
    [("read_failed", "read"), ("read_failed", "read"), ("prompt_invalid", "prompt")],
    [("prompt_invalid", "prompt"), None, None],
]


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """Five units of three rows, four of them committed with ERRORS."""
    images = pa.array([b"x"] * 15, pa.binary())
    put_parquet(open_store(f"{tmp_path}/in"), "a.parquet", pa.table({"image": images}))
    planned = plan(f"{tmp_path}/in", f"{tmp_path}/out", unit_rows=3)
    for unit, errors in zip(planned.units, ERRORS, strict=False):
        pairs = [error or (None, None) for error in errors]
        columns = {
            "unit_row": pa.array(range(3), pa.int32()),
            "error_code": pa.array([code for code, _ in pairs], pa.string()),
            "error_stage": pa.array([stage for _, stage in pairs], pa.string()),
        }
        failed = {code: 1 for code, _ in pairs if code}
        ledger = UnitLedger(rows=3, failed=failed)
        assert planned.output.commit_unit(unit.unit_id, pa.table(columns), ledger, writer="w")
    return planned


def found(planned: Planned, codes: str = "") -> dict[int, tuple[int, ...]]:
    rows = find_failed_rows(planned.output, planned.manifest, ErrorChoice.parse(codes))
    numbers = {unit.unit_id: number for number, unit in enumerate(planned.units)}
    return {numbers[unit_id]: tuple(row) for unit_id, row in rows.items()}


def test_rows_that_may_succeed_over_an_unchanged_corpus_are_asked_by_default(
    planned: Planned,
) -> None:
    assert found(planned) == {0: (1, 2), 2: (0, 1)}


@pytest.mark.parametrize("kind", [*RowError.__subclasses__(), SpprunerError, EngineError])
def test_by_its_code_alone_a_row_is_asked_as_by_its_stage(
    kind: type[RowError] | type[SpprunerError],
) -> None:
    """A ledger counts codes; the report says by them what a command asks."""
    assert asked_by_default(kind.code) == ErrorChoice().takes(kind.code, kind.stage)
    assert asked_by_default("of_a_later_version")


@pytest.mark.parametrize(
    ("codes", "rows"),
    [
        ("read_failed", {2: (0, 1)}),
        (" inference_failed, prompt_invalid,", {0: (1,), 2: (2,), 3: (0,)}),
        ("poison_row", {}),
    ],
)
def test_codes_choose(planned: Planned, codes: str, rows: dict[int, tuple[int, ...]]) -> None:
    assert found(planned, codes) == rows


def test_a_code_that_is_none_is_named_with_those_that_there_are(planned: Planned) -> None:
    message = (
        "--retry-errors read_faild: no such error code; the failed rows of this run have "
        "image_undecodable, inference_failed, prompt_invalid, read_failed"
    )
    with pytest.raises(UsageError, match=message):
        found(planned, "read_faild,read_failed")


def test_only_failed_rows_of_what_is_read_are_labelled(planned: Planned) -> None:
    rows = find_failed_rows(planned.output, planned.manifest, ErrorChoice())
    source, mapping = open_store(planned.manifest.source), planned.manifest.mapping
    units = (planned.units[0], planned.units[2])
    block = pa.concat_tables(pack_unit(read_unit(source, unit, mapping)) for unit in units)
    selected = pa.concat_tables(unpack_units(select_rows(block, rows)))
    positions = zip(selected["_in_unit"].to_pylist(), selected["_in_row"].to_pylist(), strict=True)
    first, third = planned.units[0].unit_id, planned.units[2].unit_id
    assert list(positions) == [(first, 1), (first, 2), (third, 0), (third, 1)]
