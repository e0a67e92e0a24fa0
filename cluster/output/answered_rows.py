"""Committed rows beside what they were made from: each one's image and prompt, read again."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import pyarrow.parquet as pq

from cluster.corpus.source import read_unit
from cluster.corpus.unit import Unit
from cluster.errors import UsageError
from cluster.output.manifest import Manifest, read_manifest
from cluster.runs.labeller import prompt_of
from cluster.runs.planning import done_units, unit_key
from cluster.store import Store, open_store
from sppruner.spec import PruneSpec

_COLUMNS: Final = ["key", "unit_row", "error_code", "prune_spec", "kept_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredRow:
    """One answered row. image: as the corpus holds it, compressed. kept_tokens: see
    `cluster.schema`."""

    key: str
    prompt: str
    image: bytes
    spec: PruneSpec
    kept_tokens: bytes


def answered_rows(output: str, limit: int) -> list[AnsweredRow]:
    """The first `limit` answered rows of a run in corpus order, fewer where it has no more.

    Raises UsageError where the output is no run's, has no answered row or none that says which
    tokens it kept, or where its images are no longer to be had; StoreError where a store gave up.
    """
    store = open_store(output)
    manifest = read_manifest(store)
    if manifest is None:
        raise UsageError(f"{output} holds no run (no _run/manifest.json): give a job's --output")
    source, done = open_store(manifest.source), done_units(store)
    found: list[AnsweredRow] = []
    for unit in manifest.units:
        if unit.unit_id in done and len(found) < limit:
            # No row beyond the limit is looked at: its image may be gone, and is not needed.
            found += islice(_rows_of(unit, manifest, store, source), limit - len(found))
    if found:
        return found
    if done.issuperset(unit.unit_id for unit in manifest.units):
        raise UsageError(
            f"{output} has no labelled row, every row failed: mend what their error_message says "
            "and label the corpus again, to another --output"
        )
    raise UsageError(f"{output} has no labelled row yet: resume the run first")


def _rows_of(unit: Unit, manifest: Manifest, store: Store, source: Store) -> Iterator[AnsweredRow]:
    committed = pq.read_table(io.BytesIO(store.get(unit_key(unit.unit_id))))
    if "kept_tokens" not in committed.column_names:
        raise UsageError(
            f"{store.uri}: its rows do not say which tokens were kept, an earlier version wrote "
            "them: label the corpus again, to another --output"
        )
    settings = manifest.identity.settings
    read = read_unit(source, unit, manifest.layout)
    asked = read.select(["_in_image", "_in_prompt", "_in_error_message"]).to_pylist()
    for row in committed.select(_COLUMNS).to_pylist():
        if row["error_code"] is not None:
            continue
        was = asked[row["unit_row"]]
        prompt = prompt_of(settings["kind"], settings["prompt"], was["_in_prompt"])
        if was["_in_image"] is None or prompt is None:
            raise UsageError(
                f"row {row['key']!r}: its image cannot be read again from {source.uri} "
                f"({was['_in_error_message']}): give that place the corpus as it was labelled, and "
                "access to it"
            )
        yield AnsweredRow(
            key=row["key"],
            prompt=prompt,
            image=was["_in_image"],
            spec=PruneSpec.from_dict(json.loads(row["prune_spec"])),
            kept_tokens=row["kept_tokens"],
        )
