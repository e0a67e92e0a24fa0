"""The index of one tar as bytes, so that a planner that dies loses none that it has made.

Guarantees: the name is a hash of the object's version and of all that decides about its units, so
an index of another version or of other settings is never taken for this one's.
"""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa

from cluster.corpus.unit import FileIndex, Unit
from cluster.store import ObjectInfo

# Raised when the same bytes and settings give other units.
_VERSION = 2


def name_index(
    source: str, info: ObjectInfo, *, unit_rows: int, unit_bytes: int, dotted_keys: bool
) -> str:
    """Twenty hex digits. source: URI of the store that holds the object."""
    facts = [_VERSION, source, *_describe(info), unit_rows, unit_bytes, dotted_keys]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def encode_index(index: FileIndex) -> bytes:
    """For `decode_index`."""
    record = {
        "object": _describe(index.info),
        "units": [unit.to_dict() for unit in index.units],
        "extensions": index.schema.names,
        "warnings": index.warnings,
    }
    return json.dumps(record).encode()


def decode_index(data: bytes, info: ObjectInfo) -> FileIndex | None:
    """The index of the object; None where the bytes are not one, or of another object."""
    try:
        record = json.loads(data)
        if record["object"] != _describe(info):
            return None
        return FileIndex(
            info=info,
            units=tuple(Unit.from_dict(unit) for unit in record["units"]),
            schema=pa.schema([pa.field(name, pa.binary()) for name in record["extensions"]]),
            warnings=tuple(record["warnings"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _describe(info: ObjectInfo) -> list[str | int]:
    return [info.key, info.size, info.etag]
