"""What a run is, written once beside its output: settings, corpus, units, and how two runs differ.

The manifest is created conditionally: of several drivers that start one run, all use the
manifest of the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import RunConfig
from cluster.corpus.columns import Layout
from cluster.corpus.unit import Unit
from cluster.errors import StoreError
from cluster.store import ObjectInfo, Store

MANIFEST_KEY = "_run/manifest.json"
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What may not change between resumes: settings, what they resolved to, and the corpus."""

    settings: Mapping[str, Any]
    corpus: tuple[ObjectInfo, ...]

    @classmethod
    def of(
        cls,
        config: RunConfig,
        corpus: Sequence[ObjectInfo],
        *,
        model_revision: str,
        image_backend: str,
    ) -> Identity:
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
    """One run as it was first planned. `source` is the store its units' files lie in."""

    identity: Identity
    source: str
    layout: Layout
    units: tuple[Unit, ...]
    created: str

    @property
    def run_id(self) -> str:
        return self.identity.run_id

    def to_json(self) -> bytes:
        record = {
            "run_id": self.run_id,
            "created": self.created,
            "settings": self.identity.settings,
            "source": self.source,
            "corpus": [[info.key, info.size, info.etag] for info in self.identity.corpus],
            "layout": self.layout.to_dict(),
            "units": [unit.to_dict() for unit in self.units],
        }
        return json.dumps(record, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError on anything else."""
        record = json.loads(data)
        corpus = tuple(
            ObjectInfo(key=key, size=size, etag=etag) for key, size, etag in record["corpus"]
        )
        return cls(
            identity=Identity(settings=record["settings"], corpus=corpus),
            source=record["source"],
            layout=Layout.from_dict(record["layout"]),
            units=tuple(Unit.from_dict(unit) for unit in record["units"]),
            created=record["created"],
        )


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of the run whose output `store` is, or None. Raises StoreError if unreadable."""
    if store.head(MANIFEST_KEY) is None:
        return None
    try:
        return Manifest.from_json(store.get(MANIFEST_KEY))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{store.uri_of(MANIFEST_KEY)}: not a manifest this version can read ({error!r}); "
            "choose another --output"
        ) from error


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "(not set)"
