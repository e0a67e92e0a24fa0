"""Answered rows beside what they were made from: each one's image and prompt, read again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from cluster.corpus.prompts import build_prompt
from cluster.corpus.source import read_unit
from cluster.corpus.table import input_rows
from cluster.corpus.unit import Unit
from cluster.errors import UsageError
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.store import Store, open_store
from sppruner.spec import PruneSpec

# Somebody waits at a terminal, and a corpus that was moved will not come back.
_PATIENCE_S: Final = 5.0
_COLUMNS: Final = ["key", "unit_row", "error_code", "prune_spec", "kept_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredRow:
    """One row that succeeded."""

    key: str
    """The row's key."""
    prompt: str
    """What the model was given as the user's text."""
    image: bytes
    """The image as the corpus holds it, compressed."""
    spec: PruneSpec
    """The spec it was pruned under."""
    kept_tokens: bytes
    """The tokens that entered the decoder, see `cluster.schema`."""


def answered_rows(output: str, limit: int) -> list[AnsweredRow]:
    """The first `limit` answered rows of a run in corpus order, fewer where it has no more.

    Raises UsageError where the output holds no run, has no answered row or none that says which
    tokens it kept, or where its images cannot be read any more; StoreError where a store gave up.
    """
    run = RunOutput.open(output)
    manifest = run.require_manifest()
    source = open_store(manifest.source).with_patience(_PATIENCE_S)
    done = run.committed_units()
    found: list[AnsweredRow] = []
    for unit in manifest.units:
        if unit.unit_id in done and len(found) < limit:
            # Rows beyond the limit are not read: their images may be gone.
            found += islice(_rows_of(unit, manifest, run, source), limit - len(found))
    if found:
        return found
    if done.issuperset(unit.unit_id for unit in manifest.units):
        raise UsageError(
            f"{output} has no labelled row, every row failed: mend what their error_message says "
            "and label the corpus again, to another --output"
        )
    raise UsageError(f"{output} has no labelled row yet: resume the run first")


def _rows_of(
    unit: Unit, manifest: Manifest, output: RunOutput, source: Store
) -> Iterator[AnsweredRow]:
    if "kept_tokens" not in output.unit_columns(unit.unit_id):
        raise UsageError(
            f"{output.uri}: its rows do not say which tokens were kept, an earlier version wrote "
            "them: label the corpus again, to another --output"
        )
    committed = output.read_unit(unit.unit_id, _COLUMNS).select(_COLUMNS)
    settings = manifest.identity.settings
    inputs = input_rows(read_unit(source, unit, manifest.mapping))
    for row in committed.to_pylist():
        if row["error_code"] is not None:
            continue
        given = inputs[row["unit_row"]]
        prompt = build_prompt(manifest.kind, settings["prompt"], given["_in_prompt"])
        if given["_in_image"] is None or prompt is None:
            raise UsageError(
                f"row {row['key']!r}: its image cannot be read again from {source.uri} "
                f"({given['_in_error_message']}): give that place the corpus as it was labelled, "
                "and access to it"
            )
        yield AnsweredRow(
            key=row["key"],
            prompt=prompt,
            image=given["_in_image"],
            spec=PruneSpec.from_dict(json.loads(row["prune_spec"])),
            kept_tokens=row["kept_tokens"],
        )
