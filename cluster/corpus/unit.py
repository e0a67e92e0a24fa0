"""The unit of work: consecutive rows of one object, read, answered and committed as a whole."""

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
    """Rows [row_start, row_start + row_count) of `file`, whose listed size and etag are kept.

    size_bytes: what reading it will hold, roughly. Parquet units name their row group and that
    group's first row; WebDataset units their byte range, and whether the archive breaks off in
    it, in which case the unit's last row stands for that.
    """

    unit_id: str
    format: Format
    file: str
    file_size: int
    etag: str
    row_start: int
    row_count: int
    size_bytes: int
    row_group: int | None = None
    row_group_start: int | None = None
    byte_start: int | None = None
    byte_stop: int | None = None
    truncated: bool = False

    @property
    def info(self) -> ObjectInfo:
        """The object as it was listed; reads are pinned to it."""
        return ObjectInfo(key=self.file, size=self.file_size, etag=self.etag)

    def fallback_key(self, row: int) -> str:
        """The key of the unit's row `row` where the source has none: `<file>#<row in file>`."""
        return f"{self.file}#{self.row_start + row}"

    def first(self, rows: int) -> Unit:
        """The unit of only the first `rows` rows, under an id of its own."""
        if rows >= self.row_count:
            return self
        facts = self.to_dict() | {"row_count": rows}
        for name in ("unit_id", "format", "file", "file_size", "etag", "truncated"):
            facts.pop(name, None)
        return make_unit(self.format, self.info, **facts)

    def to_dict(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None and value is not False
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Unit:
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIndex:
    """What the plan learned of one object: its units, and its columns (of a tar, the extensions
    of its members)."""

    info: ObjectInfo
    units: tuple[Unit, ...]
    schema: pa.Schema

    @property
    def rows(self) -> int:
        return sum(unit.row_count for unit in self.units)


def make_unit(format: Format, info: ObjectInfo, **where: Any) -> Unit:
    """A unit named by its content: the same rows of the same object have the same id for ever."""
    facts = {"format": format, "file": info.key, "file_size": info.size, "etag": info.etag, **where}
    name = json.dumps(facts, sort_keys=True)
    unit_id = hashlib.sha256(name.encode()).hexdigest()[:20]
    return Unit.from_dict({"unit_id": unit_id, **facts})
