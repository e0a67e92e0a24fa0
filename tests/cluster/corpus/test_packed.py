"""A unit as one row of a block."""

from __future__ import annotations

import pyarrow as pa
import pytest

from cluster.corpus.image_values import image_array
from cluster.corpus.packed import PACKED_SCHEMA, pack_unit, unpack_rows, unpack_units


def unit(rows: int) -> pa.Table:
    return pa.table(
        {"n": pa.array(range(rows), pa.int64()), "image": image_array([b"shared"] * rows)}
    )


def test_units_come_out_as_they_went_in() -> None:
    units = [unit(3), unit(0), unit(1)]
    block = pa.concat_tables(map(pack_unit, units))
    assert block.schema == PACKED_SCHEMA
    assert len(block) == 3
    assert list(unpack_units(block)) == units
    assert list(unpack_units(block.slice(2))) == units[2:]
    assert unpack_rows(block)["n"].to_pylist() == [0, 1, 2, 0]


def test_a_packed_unit_is_not_copied_when_it_is_unpacked() -> None:
    block = pack_unit(pa.table({"x": pa.array([b"x" * 10**6], pa.large_binary())}))
    before = pa.total_allocated_bytes()
    (table,) = unpack_units(block)
    assert pa.total_allocated_bytes() - before < 10**5
    assert table["x"][0].as_py() == b"x" * 10**6


def test_a_block_without_units_has_no_rows_to_give() -> None:
    with pytest.raises(ValueError, match="no units"):
        unpack_rows(PACKED_SCHEMA.empty_table())
