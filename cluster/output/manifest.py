"""What a run is: settings, corpus and units, and how two runs differ.

The manifest is written once, conditionally: drivers that start the same run at the same time all
use the manifest of the first (`RunOutput.create_manifest`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import Kind, RunConfig
from cluster.corpus.columns import ColumnMapping
from cluster.corpus.unit import Unit
from cluster.store import ObjectInfo
from sppruner.errors import SpecError
from sppruner.spec import PruneSpec

LAYOUT = 2
"""How units of new runs are called: 2 is `<run id>-<unit id>.parquet`. Outputs of layout 1, with
`<unit id>.parquet`, are read and reported."""
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What may not change between resumes."""

    settings: Mapping[str, Any]
    """`RunConfig.identity`, and what the settings resolved to: model revision, image backend."""
    corpus: tuple[ObjectInfo, ...]
    """The listed objects, by key."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        corpus: Sequence[ObjectInfo],
        *,
        model_revision: str,
        image_backend: str,
    ) -> Identity:
        """The identity of the run that `config` describes over the listed objects."""
        settings = {
            **config.identity(),
            "model_revision": model_revision,
            "image_backend": image_backend,
        }
        return cls(settings=settings, corpus=tuple(corpus))

    @property
    def run_id(self) -> str:
        """Sixteen hex digits; equal for equal settings over an unchanged corpus."""
        listing = [[info.key, info.size, info.etag] for info in self.corpus]
        text = json.dumps([self.settings, listing], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def changes(self, to: Identity) -> list[str]:
        """Each setting as `name: old → new`, and which objects were added, removed or changed."""
        old, new = dict(_flat(self.settings)), dict(_flat(to.settings))
        lines = [
            f"{name}: {_shown(old, name)} → {_shown(new, name)}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
        before = {info.key: info for info in self.corpus}
        after = {info.key: info for info in to.corpus}
        found = {
            "added": after.keys() - before.keys(),
            "removed": before.keys() - after.keys(),
            "changed": {key for key in before.keys() & after.keys() if before[key] != after[key]},
        }
        for what, keys in found.items():
            if keys:
                more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
                lines.append(f"corpus: {what} {', '.join(sorted(keys)[:_SHOWN])}{more}")
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One run as it was first planned, and all its units in corpus order, done or not."""

    identity: Identity
    """Settings and corpus; the run id is their hash."""
    source: str
    """The URI of the store that `Unit.file` is relative to."""
    mapping: ColumnMapping
    """Which source column plays which part, and the schema of the committed ones."""
    units: tuple[Unit, ...]
    """The units of work, in corpus order."""
    created: str
    """When the run was first planned, ISO 8601 in UTC."""
    layout: int = LAYOUT
    """The naming of its units' objects, see `LAYOUT`."""

    @property
    def run_id(self) -> str:
        """See `Identity.run_id`."""
        return self.identity.run_id

    @property
    def kind(self) -> Kind:
        """caption or vqa."""
        kind: Kind = self.identity.settings["kind"]
        return kind

    @property
    def rows(self) -> int:
        """Planned rows of all units."""
        return sum(unit.row_count for unit in self.units)

    @property
    def plan(self) -> str:
        """The SHA-256 of the ids of all units, in order: which units a run has is no setting."""
        return hashlib.sha256("\n".join(unit.unit_id for unit in self.units).encode()).hexdigest()

    @property
    def unread_bytes(self) -> int:
        """Damaged bytes of the corpus; each damaged range is one error row."""
        return sum(unit.unread_bytes for unit in self.units)

    def to_json(self) -> bytes:
        """For the object in the output."""
        record = {
            "run_id": self.run_id,
            "created": self.created,
            "settings": self.identity.settings,
            "source": self.source,
            "corpus": [[info.key, info.size, info.etag] for info in self.identity.corpus],
            # Layout 1 had the columns under this name: a version that knows that one alone cannot
            # read the manifest, instead of writing every unit a second time.
            "layout": self.layout,
            "columns": self.mapping.to_dict(),
            "units": [_without_object(unit.to_dict()) for unit in self.units],
        }
        # A file name on a disk need not be UTF-8: escapes hold it as it is.
        return json.dumps(record).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """The inverse of `to_json`, for every layout. Raises ValueError, KeyError, TypeError,
        AttributeError or ArrowException on anything else."""
        record = json.loads(data)
        layout, columns = record["layout"], record.get("columns")
        if columns is None:
            layout, columns = 1, layout
        if layout not in (1, LAYOUT):
            raise ValueError(f"layout {layout}")
        _check_settings(record["settings"])
        corpus = tuple(
            ObjectInfo(key=key, size=size, etag=etag) for key, size, etag in record["corpus"]
        )
        objects = {info.key: info for info in corpus}
        return cls(
            identity=Identity(settings=record["settings"], corpus=corpus),
            source=record["source"],
            mapping=ColumnMapping.from_dict(columns),
            units=tuple(Unit.from_dict(_with_object(unit, objects)) for unit in record["units"]),
            created=str(record["created"]),
            layout=layout,
        )


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raises KeyError or TypeError unless there is what readers of every manifest rely on."""
    for name in ("kind", "model", "model_revision", "prompt"):
        if not isinstance(settings[name], str):
            raise TypeError(f"settings.{name}")
    try:
        PruneSpec.from_dict(settings["spec"])
    except SpecError as error:
        raise TypeError(f"settings.spec: {error}") from error


def _without_object(unit: dict[str, Any]) -> dict[str, Any]:
    """The unit's record less what the listing holds: a large run has 100,000 units and more."""
    if "parts" in unit:
        return {"parts": [_without_object(part) for part in unit["parts"]]}
    return {name: value for name, value in unit.items() if name not in ("file_size", "etag")}


def _with_object(unit: Mapping[str, Any], objects: Mapping[str, ObjectInfo]) -> dict[str, Any]:
    """The inverse. Earlier versions wrote the unit's object with each unit."""
    if "parts" in unit:
        return {"parts": [_with_object(part, objects) for part in unit["parts"]]}
    info = objects[unit["file"]]
    return {"file_size": info.size, "etag": info.etag, **unit}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "(not set)"
