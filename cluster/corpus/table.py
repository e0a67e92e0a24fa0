"""The Arrow table of one unit, as every reader returns it.

Guarantees: the schema is `cluster.schema.input_schema`'s; rows are in source order, one per planned
row; a row with an error carries its code, message and stage, and no image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from cluster.corpus.columns import ColumnMapping
from cluster.corpus.text import is_valid, replace_invalid
from cluster.corpus.unit import Unit
from cluster.errors import ImageMissing, PromptInvalid, ReadError, RowError
from cluster.schema import input_schema


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
        range(len(rows)),
        [row.key for row in validated],
        [None if row.error else row.image for row in validated],
        [row.prompt for row in validated],
        [error and error.code for error in errors],
        [error and replace_invalid(str(error)) for error in errors],
        [error and error.stage for error in errors],
    ]
    schema = input_schema(mapping.schema)
    added = [
        pa.array(value, field.type)
        for value, field in zip(values, list(schema)[len(columns) :], strict=True)
    ]
    return pa.Table.from_arrays([*columns, *added], schema=schema)


def build_error_table(unit: Unit, mapping: ColumnMapping, reason: str) -> pa.Table:
    """The table of a unit that cannot be read: an error row for each planned row."""
    error = ReadError(f"{unit.file}: {reason}")
    rows = [SourceRow(key=unit.fallback_key(row), error=error) for row in range(unit.row_count)]
    nulls = [pa.nulls(unit.row_count, field.type) for field in mapping.schema]
    return build_unit_table(unit, mapping, rows, nulls)
