"""The unit of work: consecutive rows of one object, read, labelled and committed as a whole.

Guarantees: a unit id is a hash of what the unit covers, so the same rows of the same object content
have the same id in every run; units of a file do not overlap and together cover all its rows, or
with a limit the first ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from cluster.store import ObjectInfo

Format: TypeAlias = Literal["parquet", "webdataset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Rows [row_start, row_start + row_count) of `file`."""

    unit_id: str
    """Twenty hex digits, the hash of all other fields; see `make_unit`."""
    format: Format
    """Format of the file; selects the reader."""
    file: str
    """Key of the object, relative to the corpus store."""
    file_size: int
    """Size of the object when it was listed, bytes."""
    etag: str
    """Etag of the object when it was listed; reads of a replaced object are refused."""
    row_start: int
    """The unit's first row, counted in the file."""
    row_count: int
    """Rows of the unit, those for damaged ranges of an archive included."""
    size_bytes: int
    """Approximate memory that reading the unit takes, bytes."""
    row_group: int | None = None
    """Parquet: the row group that holds the unit. None in other formats."""
    row_group_start: int | None = None
    """Parquet: the first row of that row group, counted in the file. None in other formats."""
    byte_start: int | None = None
    """WebDataset: the unit's first byte in the archive. None in other formats."""
    byte_stop: int | None = None
    """WebDataset: the byte after the unit's last one. None in other formats."""
    truncated: bool = False
    """WebDataset, in plans of an earlier version: the archive is damaged after this unit; the
    unit's last row reports that."""
    damaged: tuple[tuple[int, int, str], ...] = ()
    """WebDataset: (first byte, byte behind, what is wrong) of each damaged range among the unit's
    samples, in order; each is one row, which reports it."""

    @property
    def info(self) -> ObjectInfo:
        """The object as it was listed; reads are pinned to its etag."""
        return ObjectInfo(key=self.file, size=self.file_size, etag=self.etag)

    def fallback_key(self, row: int) -> str:
        """The key of the unit's row `row` where the source has none: `<file>#<row in file>`."""
        return f"{self.file}#{self.row_start + row}"

    def take(self, rows: int) -> Unit:
        """The unit of the first `rows` rows, with its own id; this unit if it has no more rows."""
        if rows >= self.row_count:
            return self
        position = self.to_dict() | {"row_count": rows}
        for name in ("unit_id", "format", "file", "file_size", "etag", "truncated"):
            position.pop(name, None)
        return make_unit(self.format, self.info, **position)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest; fields that are None or False are left out."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None and value is not False and value != ()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Unit:
        """The inverse of `to_dict`. Raises TypeError on unknown or missing fields."""
        damaged = tuple((start, stop, reason) for start, stop, reason in data.get("damaged", ()))
        return cls(**{**data, "damaged": damaged})


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIndex:
    """One indexed object: its units and its columns."""

    info: ObjectInfo
    """The object as it was listed."""
    units: tuple[Unit, ...]
    """The object's units, in row order."""
    schema: pa.Schema
    """Columns of the object; of a tar, the extensions of its members."""
    unread_bytes: int = 0
    """Bytes of the object that no row holds because they are damaged; each damaged range is one
    error row."""
    warnings: tuple[str, ...] = ()
    """What the owner of the corpus should know about the object, for the plan."""

    @property
    def rows(self) -> int:
        """Rows of all units."""
        return sum(unit.row_count for unit in self.units)


def make_unit(format: Format, info: ObjectInfo, **position: Any) -> Unit:
    """A unit whose id is the hash of its object and position.

    position: the remaining fields of `Unit`. They enter the hash as given: leave out fields that
    have their default, or the ids of older runs change.
    """
    fields = {
        "format": format,
        "file": info.key,
        "file_size": info.size,
        "etag": info.etag,
        **position,
    }
    name = json.dumps(fields, sort_keys=True)
    unit_id = hashlib.sha256(name.encode()).hexdigest()[:20]
    return Unit.from_dict({"unit_id": unit_id, **fields})
