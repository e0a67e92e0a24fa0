"""The Arrow table of one unit, as every reader returns it.

Guarantees: the schema is `cluster.schema.input_schema`'s; rows are in source order, one per planned
row; a row with an error carries its code, message and stage, and no image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from cluster.corpus.columns import ColumnMapping
from cluster.corpus.image_values import image_array, image_values
from cluster.corpus.text import is_valid, replace_invalid
from cluster.corpus.unit import Unit
from cluster.errors import ImageMissing, PromptInvalid, ReadError, RowError
from cluster.schema import INPUT_FIELDS, input_schema


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """One row as read: image and prompt, or an error."""

    key: str
    """The row's key; not necessarily unique."""
    image: bytes | None = None
    """The encoded image; None where the row has none."""
    prompt: str | None = None
    """The row's prompt or question; None where it has none."""
    error: RowError | None = None
    """Why the row cannot be labelled; None if it can be."""

    def validate(self) -> SourceRow:
        """The row, with an error if its prompt or image is missing or its text is not valid."""
        if not (is_valid(self.key) and is_valid(self.prompt or "")):
            error = self.error or PromptInvalid("key or prompt has half a surrogate pair")
            prompt = self.prompt and replace_invalid(self.prompt)
            return replace(self, key=replace_invalid(self.key), prompt=prompt, error=error)
        if self.error is not None:
            return self
        if self.prompt is None or not self.prompt.strip():
            return replace(self, error=PromptInvalid("the row has no question"))
        if self.image is None:
            return replace(self, error=ImageMissing("the row has no image"))
        return self


def build_unit_table(
    unit: Unit, mapping: ColumnMapping, rows: Sequence[SourceRow], columns: Sequence[pa.Array]
) -> pa.Table:
    """The table of the unit's rows.

    rows: in source order. columns: the committed source columns of these rows, as
    `mapping.schema` orders and types them.
    """
    validated = [row.validate() for row in rows]
    errors = [row.error for row in validated]
    values = [
        [unit.unit_id] * len(rows),
        [unit.row_count] * len(rows),
        range(len(rows)),
        [row.key for row in validated],
        image_array([None if row.error else row.image for row in validated]),
        [row.prompt for row in validated],
        [error and error.code for error in errors],
        [error and replace_invalid(str(error)) for error in errors],
        [error and error.stage for error in errors],
    ]
    schema = input_schema(mapping.schema)
    added = [
        value if isinstance(value, pa.Array) else pa.array(value, field.type)
        for value, field in zip(values, list(schema)[len(columns) :], strict=True)
    ]
    return pa.Table.from_arrays([*columns, *added], schema=schema)


def build_error_table(unit: Unit, mapping: ColumnMapping, reason: str) -> pa.Table:
    """The table of a unit that cannot be read: an error row for each planned row."""
    error = ReadError(f"{unit.file}: {reason}")
    rows = [SourceRow(key=unit.fallback_key(row), error=error) for row in range(unit.row_count)]
    nulls = [pa.nulls(unit.row_count, field.type) for field in mapping.schema]
    return build_unit_table(unit, mapping, rows, nulls)


def input_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The INPUT_FIELDS of each row by name; rows that share an image share its bytes object."""
    names = [field.name for field in INPUT_FIELDS]
    columns = [
        image_values(column.combine_chunks()) if name == "_in_image" else column.to_pylist()
        for name, column in zip(names, table.select(names).columns, strict=True)
    ]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def join_tables(unit: Unit, tables: Sequence[pa.Table]) -> pa.Table:
    """The table of a unit from those of its parts."""
    joined = pa.concat_tables(tables).combine_chunks()
    added = {
        "_in_unit": pa.repeat(pa.scalar(unit.unit_id), len(joined)),
        "_in_row": pa.array(range(len(joined)), pa.int32()),
        "_in_unit_rows": pa.repeat(pa.scalar(unit.row_count, pa.int32()), len(joined)),
    }
    for name, column in added.items():
        position = joined.schema.get_field_index(name)
        joined = joined.set_column(position, joined.schema.field(name), column)
    return joined
