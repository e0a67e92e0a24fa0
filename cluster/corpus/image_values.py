"""Encoded images in a column: plain bytes, a struct with bytes, or a list of one of either.

Guarantees: rows that repeat an image share one bytes object, as the file shares one dictionary
entry; nothing is decoded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import pyarrow as pa
from pyarrow import types

from cluster.errors import ReadError

ImageValue: TypeAlias = bytes | ReadError | None
"""One row's encoded image, why it has none that can be used, or None where it has none."""


def image_values(array: pa.Array) -> list[ImageValue]:
    """The image of each row. Of a struct, its `bytes`."""
    kind = array.type
    if types.is_dictionary(kind):
        values = image_values(array.dictionary)
        return [None if index is None else values[index] for index in array.indices.to_pylist()]
    if types.is_list(kind) or types.is_large_list(kind):
        return _values_of_lists(array)
    if types.is_struct(kind):
        found = image_values(array.field("bytes"))
        if not array.null_count:
            return found
        valid = array.is_valid().to_pylist()
        return [value if there else None for value, there in zip(found, valid, strict=True)]
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
