"""The unit of work: consecutive rows of the corpus, read, labelled and committed as a whole.

Guarantees: a unit id is a hash of what the unit covers, so the same rows of the same object content
have the same id in every run; units do not overlap and together cover all rows, or with a limit the
first ones. Where row groups or files are small a unit has several parts, each as a unit of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, TypeAlias

import pyarrow as pa

from cluster.corpus.text import escape_invalid
from cluster.store import ObjectInfo

Format: TypeAlias = Literal["parquet", "webdataset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Rows [row_start, row_start + row_count) of `file`; or the rows of its parts, one after the
    other, and then the fields of a position are those of the first part."""

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
    parts: tuple[Unit, ...] = ()
    """What the unit is made of, in row order, where that is more than one piece; else empty."""

    @property
    def pieces(self) -> tuple[Unit, ...]:
        """The parts; of a unit in one piece, the unit."""
        return self.parts or (self,)

    @property
    def unread_bytes(self) -> int:
        """Bytes of the damaged ranges."""
        damaged = (each for piece in self.pieces for each in piece.damaged)
        return sum(stop - start for start, stop, _ in damaged)

    @property
    def info(self) -> ObjectInfo:
        """The object as it was listed; reads are pinned to its etag."""
        return ObjectInfo(key=self.file, size=self.file_size, etag=self.etag)

    def fallback_key(self, row: int) -> str:
        """The key of the unit's row `row` where the source has none: `<file>#<row in file>`."""
        for piece in self.pieces:
            if row < piece.row_count:
                break
            row -= piece.row_count
        return f"{escape_invalid(piece.file)}#{piece.row_start + row}"

    def take(self, rows: int) -> Unit:
        """The unit of the first `rows` rows, with its own id; this unit if it has no more rows."""
        if rows >= self.row_count:
            return self
        if self.parts:
            return join_units(take_rows(self.parts, rows))
        position = self.to_dict() | {"row_count": rows}
        for name in ("unit_id", "format", "file", "file_size", "etag", "truncated"):
            position.pop(name, None)
        return make_unit(self.format, self.info, **position)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; fields that are None, False or empty are left out. Of a unit of several
        parts only these: all else follows from them."""
        if self.parts:
            return {"parts": [part.to_dict() for part in self.parts]}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if value is not None and value is not False and value != ()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Unit:
        """The inverse of `to_dict`. Raises TypeError or ValueError on unknown or missing fields,
        and on values of other types."""
        if "parts" in data:
            if not data["parts"]:
                raise ValueError("a unit without parts")
            return join_units([cls.from_dict(part) for part in data["parts"]])
        damaged = tuple((start, stop, reason) for start, stop, reason in data.get("damaged", ()))
        unit = cls(**{**data, "damaged": damaged})
        values = [(name, getattr(unit, name), kinds) for name, kinds in _KINDS.items()]
        values += [
            ("damaged", byte, (int,)) for start, stop, _ in damaged for byte in (start, stop)
        ]
        for name, value, kinds in values:
            if type(value) not in kinds:
                raise TypeError(f"{name} {value!r} of a unit")
        return unit


_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    **dict.fromkeys(("unit_id", "format", "file", "etag"), (str,)),
    **dict.fromkeys(("file_size", "row_start", "row_count", "size_bytes"), (int,)),
    **dict.fromkeys(("row_group", "row_group_start", "byte_start", "byte_stop"), (int, type(None))),
    "truncated": (bool,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIndex:
    """One indexed object: its units and its columns."""

    info: ObjectInfo
    """The object as it was listed."""
    units: tuple[Unit, ...]
    """The object's units, in row order."""
    schema: pa.Schema
    """Columns of the object; of a tar, the extensions of its members."""
    warnings: tuple[str, ...] = ()
    """What the owner of the corpus should know about the object, for the plan."""

    @property
    def rows(self) -> int:
        """Rows of all units."""
        return sum(unit.row_count for unit in self.units)

    @property
    def unread_bytes(self) -> int:
        """Bytes of the object that are damaged; each damaged range is one error row."""
        return sum(unit.unread_bytes for unit in self.units)


def make_unit(format: Format, info: ObjectInfo, **position: Any) -> Unit:
    """A unit whose id is the hash of its object and position.

    position: the remaining fields of `Unit`. They enter the hash as given: leave out fields that
    have their default, or the ids of older runs change.
    """
    described = {
        "format": format,
        "file": info.key,
        "file_size": info.size,
        "etag": info.etag,
        **position,
    }
    name = json.dumps(described, sort_keys=True)
    unit_id = _hash(name)
    return Unit.from_dict({"unit_id": unit_id, **described})


def join_units(parts: Sequence[Unit]) -> Unit:
    """One unit of all these; the only one as it is. Its id is the hash of their ids."""
    first, *others = parts
    if not others:
        return first
    return Unit(
        unit_id=_hash("\n".join(part.unit_id for part in parts)),
        format=first.format,
        file=first.file,
        file_size=first.file_size,
        etag=first.etag,
        row_start=first.row_start,
        row_count=sum(part.row_count for part in parts),
        size_bytes=sum(part.size_bytes for part in parts),
        parts=tuple(parts),
    )


def group_units(units: Iterable[Unit], *, unit_rows: int, unit_bytes: int) -> Iterator[Unit]:
    """Joins neighbours for as long as they hold up to `unit_rows` rows and `unit_bytes` bytes
    together: row groups of a hundred rows must not make an object of every hundred rows."""
    group: list[Unit] = []
    rows = size = 0
    for unit in units:
        if group and (rows + unit.row_count > unit_rows or size + unit.size_bytes > unit_bytes):
            yield join_units(group)
            group, rows, size = [], 0, 0
        group.append(unit)
        rows, size = rows + unit.row_count, size + unit.size_bytes
    if group:
        yield join_units(group)


def take_rows(units: Iterable[Unit], rows: int) -> list[Unit]:
    """The units of the first `rows` rows; the last of them may be shorter than planned."""
    taken: list[Unit] = []
    for unit in units:
        if rows <= 0:
            break
        taken.append(unit.take(rows))
        rows -= unit.row_count
    return taken


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]
