"""Arrow types of a corpus: what each shard stores, as one plain type that keeps every value.

Writers of one data set disagree: an all-null column has type null, small integers are narrower,
strings are views or dictionaries, fields are required. None of that changes a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from cluster.errors import UsageError


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries, run ends, views and required fields, at every depth.

    A row that cannot be read, or a file that lacks a column or a field, is null there, and a null
    has no values for the required fields in it. An extension that requires some is its storage.
    """
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        storage = plain_type(kind.storage_type)
        return kind if storage == kind.storage_type else storage
    if types.is_string_view(kind):
        return pa.large_string()
    if types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_struct(kind):
        plain = [field.with_type(plain_type(field.type)) for field in kind]
        return pa.struct([field.with_nullable(True) for field in plain])
    if types.is_map(kind):
        key, item = plain_type(kind.key_type), plain_type(kind.item_type)
        return pa.map_(key, item, keys_sorted=kind.keys_sorted)
    if types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(plain_type(kind.value_type))
    if types.is_list(kind) or types.is_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind


def is_binary(kind: pa.DataType) -> bool:
    """Whether values are bytes of any length, however they are encoded."""
    kind = plain_type(kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def is_string(kind: pa.DataType) -> bool:
    """Whether values are text, however they are encoded."""
    kind = plain_type(kind)
    return types.is_string(kind) or types.is_large_string(kind)


def unify_schemas(schemas: Sequence[pa.Schema], names: Sequence[str]) -> pa.Schema:
    """One plain schema that holds the rows of all files without loss: a column that some lack is
    null there, integers and times widen, a null column takes the others' type.

    names: of the files, for errors. Raises UsageError where two files cannot be unified, naming
    both and the column.
    """
    unified: dict[str, pa.DataType] = {}
    first_file: dict[str, str] = {}
    seen: dict[str, list[pa.DataType]] = {}  # not all types can be hashed
    for schema, file in zip(schemas, names, strict=True):
        for field in schema:
            first_file.setdefault(field.name, file)
            known_types = seen.setdefault(field.name, [])
            if field.type in known_types:  # a corpus has thousands of files and few types
                continue
            known_types.append(field.type)
            kind = plain_type(field.type)
            known = unified.get(field.name, kind)
            both = _unify(known, kind)
            if both is None:
                raise UsageError(
                    f"{file} differs from {first_file[field.name]}: column {field.name!r} is "
                    f"{kind} instead of {known}; run them as separate corpora"
                )
            unified[field.name] = both
    return pa.schema(list(unified.items()))


def conform(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The array as `kind`, which unifies its type. Raises ArrowInvalid for a value that does not
    fit: a time beyond the range of nanoseconds."""
    if array.type == kind:
        return array
    if types.is_null(array.type) or not len(array):
        return pa.nulls(len(array), kind)
    if isinstance(array.type, pa.BaseExtensionType):
        return conform(array.storage, kind)
    if types.is_struct(kind) and types.is_struct(array.type):
        fields = array.flatten()  # null where the struct is: there a required field holds anything
        children = [
            conform(fields[array.type.get_field_index(field.name)], field.type)
            if array.type.get_field_index(field.name) >= 0
            else pa.nulls(len(array), field.type)
            for field in kind
        ]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    if types.is_list(kind) or types.is_large_list(kind):
        lengths = [0 if length is None else length for length in _lengths(array)]
        return (pa.ListArray if types.is_list(kind) else pa.LargeListArray).from_arrays(
            list(accumulate(lengths, initial=0)),
            conform(array.flatten(), kind.value_type),
            type=kind,
            mask=_mask(array),
        )
    if types.is_map(kind):
        offsets = array.offsets
        first, last = offsets[0].as_py(), offsets[-1].as_py()
        return pa.MapArray.from_arrays(
            pc.subtract(offsets, offsets[0]),
            conform(array.keys.slice(first, last - first), kind.key_type),
            conform(array.items.slice(first, last - first), kind.item_type),
            type=kind,
            mask=_mask(array),
        )
    if types.is_fixed_size_list(kind):
        size = kind.list_size
        values = array.values.slice(array.offset * size, len(array) * size)
        return pa.FixedSizeListArray.from_arrays(
            conform(values, kind.value_type), type=kind, mask=_mask(array)
        )
    return array.cast(kind)


def _unify(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both; None where there is none without loss."""
    if first == second:
        return first
    try:
        both: pa.DataType = (
            pa.unify_schemas(
                [pa.schema([("", first)]), pa.schema([("", second)])],
                promote_options="permissive",
            )
            .field(0)
            .type
        )
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None
    return both if _keeps(first, both) and _keeps(second, both) else None


def _keeps(kind: pa.DataType, wider: pa.DataType) -> bool:
    """Whether every value of `kind` is one of `wider`. Arrow's own promotion also makes doubles of
    64-bit integers, signed of unsigned ones, and text of bytes."""
    if kind == wider or types.is_null(kind):
        return True
    if types.is_struct(kind) and types.is_struct(wider):
        return all(_keeps(field.type, wider.field(field.name).type) for field in kind)
    if _is_list(kind) and _is_list(wider):
        return _keeps(kind.value_type, wider.value_type)
    if types.is_integer(kind) and types.is_floating(wider):
        return bool(kind.bit_width < {16: 11, 32: 24, 64: 53}[wider.bit_width])
    if types.is_integer(kind) and types.is_integer(wider):
        needs_sign = types.is_signed_integer(wider) and types.is_unsigned_integer(kind)
        return bool(kind.bit_width + needs_sign <= wider.bit_width)
    pairs = (is_string, is_binary, types.is_floating, types.is_timestamp, types.is_decimal)
    return any(test(kind) and test(wider) for test in pairs)


def _mask(array: pa.Array) -> pa.Array | None:
    """True for each null; None where there is none."""
    return array.is_null() if array.null_count else None


def _lengths(array: pa.Array) -> list[int | None]:
    lengths: list[int | None] = pc.list_value_length(array).to_pylist()
    return lengths


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
