"""A unit as one row of a Ray Data block, from the reader to the sink.

Ray divides blocks to raise their number or bound their size, and joins what a task yields into one.
A row it never divides, so a unit stays whole by construction, and one task may yield several units.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

PACKED_SCHEMA = pa.schema([pa.field("_packed_unit", pa.large_binary())])
"""One row a unit: its table as an Arrow IPC stream."""
SMALLEST_BLOCK = 1
"""Ray's target size of a block, bytes, with which each packed unit is a block of its own."""


def pack_unit(table: pa.Table) -> pa.Table:
    """The unit's table as a table of one row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    data = sink.getvalue()
    offsets = pa.array([0, data.size], pa.int64()).buffers()[1]
    packed = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])
    return pa.Table.from_arrays([packed], schema=PACKED_SCHEMA)


def unpack_units(block: pa.Table) -> Iterator[pa.Table]:
    """The tables of a block's units, in order; their columns lie in the block's memory."""
    for packed in block.column(0):
        yield pa.ipc.open_stream(packed.as_buffer()).read_all()


def unpack_rows(block: pa.Table) -> pa.Table:
    """The rows of a block's units, for a Ray Data pipeline that goes on with rows:
    `labelled.map_batches(unpack_rows, batch_size=None, batch_format="pyarrow")`. Raises ValueError
    for a block without units, whose columns nobody knows."""
    tables = list(unpack_units(block))
    if not tables:
        raise ValueError("the block has no units")
    return pa.concat_tables(tables)
