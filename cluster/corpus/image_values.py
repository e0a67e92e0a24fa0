"""Encoded images in a column: plain bytes, a struct with bytes, or a list of one of either.

Guarantees: rows that repeat an image share one bytes object, as the file shares one dictionary
entry; nothing is decoded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import pyarrow as pa
from pyarrow import types

from cluster.corpus.types import conform, is_string
from cluster.errors import ImageMissing, ReadError, RowError

ImageValue: TypeAlias = bytes | RowError | None
"""One row's encoded image, why it has none that can be used, or None where it has none."""

_PATH_ALONE = (
    "the row has no image, only its path {!r}: store the image's bytes, as datasets' "
    "push_to_hub(embed_external_files=True) does"
)
_SHOWN = 200


def image_values(array: pa.Array) -> list[ImageValue]:
    """The image of each row. Of a struct, its `bytes`; a path without them is ImageMissing."""
    kind = array.type
    if types.is_dictionary(kind):
        values = image_values(array.dictionary)
        return [None if index is None else values[index] for index in array.indices.to_pylist()]
    if types.is_list(kind) or types.is_large_list(kind):
        return _values_of_lists(array)
    if types.is_struct(kind):
        return _values_of_structs(array)
    values_of_plain: list[ImageValue] = array.to_pylist()
    return values_of_plain


def image_array(images: Sequence[bytes | None]) -> pa.DictionaryArray:
    """The images as one column, in which rows that share a bytes object share its bytes."""
    position_of: dict[int, int] = {}
    distinct: list[bytes] = []
    indices: list[int | None] = []
    for image in images:
        if image is None:
            indices.append(None)
            continue
        position = position_of.setdefault(id(image), len(distinct))
        if position == len(distinct):
            distinct.append(image)
        indices.append(position)
    return pa.DictionaryArray.from_arrays(
        pa.array(indices, pa.int32()), pa.array(distinct, pa.large_binary())
    )


def _values_of_structs(array: pa.StructArray) -> list[ImageValue]:
    has_bytes = array.type.get_field_index("bytes") >= 0  # else other files have them
    inner = image_values(array.field("bytes")) if has_bytes else [None] * len(array)
    valid = array.is_valid().to_pylist()
    found = [value if there else None for value, there in zip(inner, valid, strict=True)]
    absent = [row for row, value in enumerate(found) if value is None and valid[row]]
    if not absent:
        return found
    for row, path in zip(absent, _paths(array, absent), strict=True):
        found[row] = ImageMissing(_PATH_ALONE.format(path)) if path else None
    return found


def _paths(array: pa.StructArray, rows: Sequence[int]) -> list[str]:
    """The beginning of each row's `path`, for a message; empty where there is none."""
    index = array.type.get_field_index("path")
    if index < 0 or not is_string(array.type.field(index).type):
        return [""] * len(rows)
    # As bytes: what is not UTF-8 cannot be had as text.
    paths = conform(array.field(index), pa.large_string()).cast(pa.large_binary())
    found = (paths[row].as_py() or b"" for row in rows)
    return [path[:_SHOWN].decode("utf-8", "replace") for path in found]


def _values_of_lists(array: pa.Array) -> list[ImageValue]:
    values = iter(image_values(array.flatten()))
    lengths = array.value_lengths().to_pylist()
    rows: list[ImageValue] = []
    for length in lengths:
        images = [next(values) for _ in range(length or 0)]
        if len(images) > 1:
            rows.append(ReadError(f"{len(images)} images in one row, where one is labelled"))
        else:
            rows.append(images[0] if images else None)
    return rows
