"""One unit as the Arrow table its readers hand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from cluster.corpus.columns import ColumnMapping
from cluster.corpus.unit import Unit
from cluster.errors import ImageMissing, PromptInvalid, ReadError, RowError
from cluster.schema import input_schema


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """One row as read: an image and a prompt, or the error that stands in their place."""

    key: str
    image: bytes | None = None
    prompt: str | None = None
    error: RowError | None = None

    def checked(self) -> SourceRow:
        """The row with what is missing from it noted as its error."""
        if self.error is not None:
            return self
        if self.prompt is None or not self.prompt.strip():
            return replace(self, error=PromptInvalid("the row has no question"))
        if self.image is None:
            return replace(self, error=ImageMissing("the row has no image"))
        return self


def unit_table(
    unit: Unit, mapping: ColumnMapping, rows: Sequence[SourceRow], columns: Sequence[pa.Array]
) -> pa.Table:
    """The unit's rows in order, with `columns` as mapping.schema has them."""
    checked = [row.checked() for row in rows]
    errors = [row.error for row in checked]
    values = [
        [unit.unit_id] * len(rows),
        range(len(rows)),
        [row.key for row in checked],
        [None if row.error else row.image for row in checked],
        [row.prompt for row in checked],
        [error and error.code for error in errors],
        [error and str(error) for error in errors],
        [error and error.stage for error in errors],
    ]
    schema = input_schema(mapping.schema)
    added = [
        pa.array(value, field.type)
        for value, field in zip(values, list(schema)[len(columns) :], strict=True)
    ]
    return pa.Table.from_arrays([*columns, *added], schema=schema)


def unreadable_table(unit: Unit, mapping: ColumnMapping, reason: str) -> pa.Table:
    """Every planned row of a unit that cannot be read, as an error row."""
    error = ReadError(f"{unit.file}: {reason}")
    rows = [SourceRow(key=unit.fallback_key(row), error=error) for row in range(unit.row_count)]
    nulls = [pa.nulls(unit.row_count, field.type) for field in mapping.schema]
    return unit_table(unit, mapping, rows, nulls)
