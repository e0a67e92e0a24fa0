"""Text that is not UTF-8 is found and replaced once, row by row, in any type of column."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from cluster.corpus.text import clean_array, is_valid, replace_invalid


def strings(values: list[bytes], kind: pa.DataType) -> pa.Array:
    """An array of strings with these bytes, whatever they are."""
    binary = pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
    return pa.Array.from_buffers(kind, len(values), pa.array(values, binary).buffers())


@given(
    st.lists(st.binary(max_size=6), max_size=8), st.sampled_from([pa.string(), pa.large_string()])
)
def test_any_bytes_become_valid_text_and_exactly_the_changed_rows_are_named(
    values: list[bytes], kind: pa.DataType
) -> None:
    cleaned, changed = clean_array(strings(values, kind))
    cleaned.validate(full=True)
    assert cleaned.type == kind
    assert cleaned.to_pylist() == [value.decode("utf-8", "replace") for value in values]
    assert changed == [
        n for n, value in enumerate(values) if value.decode("utf-8", "replace").encode() != value
    ]


def test_a_row_whose_fields_hold_invalid_text_becomes_null() -> None:
    field = strings([b"fine", b"\xc9"], pa.string())
    struct = pa.StructArray.from_arrays([field], ["answer"])
    cleaned, changed = clean_array(struct)
    assert (cleaned.to_pylist(), changed) == ([{"answer": "fine"}, None], [1])
    listed, changed = clean_array(pa.ListArray.from_arrays([0, 1, 2], field))
    assert (listed.to_pylist(), changed) == ([["fine"], None], [1])


@given(st.text(st.characters()))
def test_lone_surrogates_are_replaced(text: str) -> None:
    replaced = replace_invalid(text)
    replaced.encode()
    assert is_valid(replaced)
    assert is_valid(text) == (replaced == text)
