"""Types of unequal shards: one type that keeps every value, or a refusal that names both files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.corpus.types import conform, plain_type, unify_schemas
from cluster.errors import UsageError
from cluster.store import open_store
from tests.cluster.corpora import image, plan, put_parquet, read_all


class Tagged(pa.ExtensionType):
    """An extension over a struct with a required field, which it cannot do without."""

    def __init__(self) -> None:
        super().__init__(REQUIRED, "tests.tagged")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Tagged:
        return cls()


REQUIRED = pa.struct([pa.field("a", pa.int8(), nullable=False)])
KINDS: list[pa.DataType] = [
    pa.null(), pa.bool_(), pa.int8(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64(),
    pa.float32(), pa.float64(), pa.string(), pa.large_string(), pa.string_view(), pa.binary(),
    pa.binary_view(), pa.timestamp("s"), pa.timestamp("us", "UTC"), pa.date32(),
    pa.decimal128(5, 2), pa.decimal128(12, 3), pa.dictionary(pa.int8(), pa.string()),
    pa.list_(pa.int8()), pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_(pa.null()),
    pa.list_(pa.string_view()), pa.struct([("a", pa.int8())]),
    pa.struct([("a", pa.int64()), ("b", pa.string())]),
    pa.list_(pa.struct([("a", pa.int8())])),
    pa.list_(pa.struct([("b", pa.string()), ("a", pa.int64())])),
    REQUIRED, pa.struct([("a", REQUIRED)]), pa.struct([pa.field("b", REQUIRED, nullable=False)]),
    pa.list_(pa.field("item", REQUIRED, nullable=False)), pa.list_(REQUIRED, 2),
    pa.list_(pa.field("item", pa.struct([("a", pa.int64()), ("b", REQUIRED)]), nullable=False), 2),
    pa.map_(pa.string(), pa.field("value", REQUIRED, nullable=False)),
    pa.map_(pa.string(), pa.dictionary(pa.int8(), pa.string())),
    pa.map_(pa.string_view(), pa.list_view(pa.string_view())), Tagged(),
]  # fmt: skip


def is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in (*tests, pa.types.is_list_view))


def values_of(kind: pa.DataType) -> list[Any]:
    """Values at the edges of a type, and null."""
    if pa.types.is_null(kind):
        return [None, None]
    if pa.types.is_integer(kind):
        signed = pa.types.is_signed_integer(kind)
        low = -(2 ** (kind.bit_width - 1)) if signed else 0
        return [low, low + 2**kind.bit_width - 1, None]
    if pa.types.is_floating(kind):
        return [0.1, 2.0**100, None]
    if pa.types.is_dictionary(kind):
        return ["x", "y", "x", None]
    if isinstance(kind, pa.ExtensionType):
        return values_of(kind.storage_type)
    if pa.types.is_struct(kind):
        return [{field.name: values_of(field.type)[0] for field in kind}, None]
    if pa.types.is_map(kind):
        pairs = zip(["k", "j"], values_of(kind.item_type), strict=False)
        return [[(k, v) for k, v in pairs if v is not None or kind.item_field.nullable], None]
    if is_list(kind):
        values = values_of(kind.value_type)
        if not kind.value_field.nullable:
            values = [value for value in values if value is not None]
        if pa.types.is_fixed_size_list(kind):
            return [(values * 2)[: kind.list_size], None]
        return [values, [], None]
    if pa.types.is_boolean(kind):
        return [True, None]
    if pa.types.is_decimal(kind):
        return [pa.scalar("999.99").cast(kind).as_py(), None]
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return (
            pa.array([1, None], pa.int32())
            .cast(pa.int64() if kind.bit_width == 64 else pa.int32())
            .cast(kind)
            .to_pylist()
        )
    text = ["é", "", None]
    is_text = plain_type(kind) in (pa.string(), pa.large_string())
    return text if is_text else [value and value.encode() for value in text]


def with_nulls(value: Any, kind: pa.DataType) -> Any:
    """The value as a struct of more fields holds it."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        return {field.name: with_nulls(value.get(field.name), field.type) for field in kind}
    if is_list(kind):
        return [with_nulls(one, kind.value_type) for one in value]
    return value


@settings(max_examples=500, deadline=None)
@given(first=st.sampled_from(KINDS), second=st.sampled_from(KINDS))
def test_two_types_become_one_that_keeps_every_value_or_are_refused(
    first: pa.DataType, second: pa.DataType
) -> None:
    schemas = [pa.schema([("x", first)]), pa.schema([("x", second)])]
    try:
        kind = unify_schemas(schemas, ["a", "b"]).field("x").type
    except UsageError:
        return
    assert kind == plain_type(kind)
    for one in (first, second):
        values = values_of(one)
        array = pa.array(values, one)
        for part in (array, array.slice(1)):
            held = conform(part, kind)
            held.validate(full=True)
            assert held.type == kind
            assert pa.nulls(1, kind).cast(kind).null_count == 1, "nothing in it is required"
            held.cast(kind)
            expected = [with_nulls(value, kind) for value in part.to_pylist()]
            assert held.to_pylist() == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.int64(), pa.float64()),
        (pa.uint64(), pa.int64()),
        (pa.string(), pa.binary()),
        (pa.bool_(), pa.int8()),
        (pa.list_(pa.int64()), pa.list_(pa.float32())),
    ],
)
def test_types_whose_union_would_lose_values_are_refused(
    first: pa.DataType, second: pa.DataType
) -> None:
    with pytest.raises(UsageError, match=r"b differs from a: column 'x' is .* separate corpora"):
        unify_schemas([pa.schema([("x", first)]), pa.schema([("x", second)])], ["a", "b"])


def test_shards_of_unequal_columns_are_one_corpus(tmp_path: Path) -> None:
    corpus = open_store(str(tmp_path / "in"))
    put_parquet(corpus, "a.parquet", pa.table({"image": [image()], "n": pa.array([1], pa.int8())}))
    more = {"n": [2**40], "note": pa.array(["x"]).dictionary_encode()}
    put_parquet(corpus, "b.parquet", pa.table({**more, "image": [image()]}))
    put_parquet(corpus, "c.parquet", pa.table({"image": [image()], "n": pa.nulls(1)}))
    read = read_all(plan(corpus.uri, str(tmp_path / "out")))
    assert read["n"].to_pylist() == [1, 2**40, None]
    assert read["note"].to_pylist() == [None, "x", None]
    assert read["_in_error_code"].to_pylist() == [None] * 3


def test_a_file_without_images_is_no_part_of_the_corpus(tmp_path: Path) -> None:
    corpus = open_store(str(tmp_path / "in"))
    put_parquet(corpus, "a.parquet", pa.table({"image": [image()]}))
    put_parquet(corpus, "b.parquet", pa.table({"note": ["x"]}))
    with pytest.raises(UsageError, match=r"b\.parquet has no column image"):
        plan(corpus.uri, str(tmp_path / "out"))
