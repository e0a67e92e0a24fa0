"""Text of a corpus is made valid UTF-8 once, when it is read.

Parquet files hold whatever their writer put there, and JSON may escape half a surrogate pair.
Nothing behind the readers can store, send or tokenise either.
"""

from __future__ import annotations

import pyarrow as pa


def replace_invalid(text: str) -> str:
    """The text with `?` in place of each lone surrogate."""
    return text.encode("utf-8", "replace").decode()


def escape_invalid(text: str) -> str:
    """The text with an escape in place of each lone surrogate, as names of files have that are not
    UTF-8: names that differ stay different."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_valid(text: str) -> bool:
    """Whether the text has no lone surrogate."""
    return replace_invalid(text) == text


def clean_array(array: pa.Array) -> tuple[pa.Array, list[int]]:
    """A column with valid text, and the positions of the rows that had to be changed.

    In an array of strings invalid bytes become U+FFFD; in other types, whose fields hold the
    text, the whole row becomes null.
    """
    if _is_readable(array):
        return array, []
    # Not slices: a slice of a struct or a list is validated with all its neighbours' fields.
    rows = [array.take(pa.array([number])) for number in range(len(array))]
    changed = [number for number, row in enumerate(rows) if not _is_readable(row)]
    for number in changed:
        rows[number] = _replacement(rows[number])
    return pa.concat_arrays(rows), changed


def _is_readable(array: pa.Array) -> bool:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _replacement(row: pa.Array) -> pa.Array:
    if pa.types.is_string(row.type) or pa.types.is_large_string(row.type):
        (data,) = row.cast(pa.large_binary()).to_pylist()
        return pa.array([data.decode("utf-8", "replace")], row.type)
    return pa.nulls(1, row.type)
