"""Column types with required fields at any depth, and values of them, for Hypothesis."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

MARK = "@@"
"""In texts; a test puts bytes that are not UTF-8 in its place, in the file."""


@st.composite
def nested_types(draw: st.DrawFn, depth: int = 4) -> pa.DataType:
    """A type that Parquet holds. Fields, items and values are required or not."""
    leaves = [pa.int32(), pa.string(), pa.dictionary(pa.int32(), pa.string())]
    shapes = ["struct", "list", "large list", "fixed list", "map", "leaf"]
    shape = draw(st.sampled_from(shapes)) if depth else "leaf"
    if shape == "leaf":
        return draw(st.sampled_from(leaves))
    inner = [
        pa.field(name, draw(nested_types(depth=depth - 1)), nullable=draw(st.booleans()))
        for name in ("a", "b")[: draw(st.integers(1, 2)) if shape == "struct" else 1]
    ]
    if shape == "struct":
        return pa.struct(inner)
    if shape == "map":
        return pa.map_(pa.string(), inner[0])
    if shape == "fixed list":
        return pa.list_(inner[0], draw(st.integers(1, 2)))
    return (pa.list_ if shape == "list" else pa.large_list)(inner[0])


def can_be_read(table: pa.Table) -> bool:
    """Whether Arrow reads the Parquet file that it writes of the table. Not one with a required
    list of fixed size in a null struct, for instance."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    try:
        return bool(pq.read_table(buffer).num_rows == table.num_rows)
    except pa.ArrowInvalid:
        return False


def values_of(field: pa.Field) -> st.SearchStrategy[Any]:
    """Values of a field, null among them where it is not required. Texts may hold MARK."""
    values = _values(field.type)
    return st.none() | values if field.nullable else values


def _values(kind: pa.DataType) -> st.SearchStrategy[Any]:
    if pa.types.is_struct(kind):
        return st.fixed_dictionaries({field.name: values_of(field) for field in kind})
    if pa.types.is_map(kind):
        return st.lists(st.tuples(st.sampled_from("kj"), values_of(kind.item_field)), max_size=2)
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size
        return st.lists(values_of(kind.value_field), min_size=size, max_size=size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return st.lists(values_of(kind.value_field), max_size=2)
    return st.integers(0, 9) if pa.types.is_integer(kind) else st.sampled_from(["é", MARK])
