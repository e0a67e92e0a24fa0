"""Accuracy of short answers where the corpus has references."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa

from cluster.corpus.columns import ColumnMapping
from cluster.corpus.text import replace_invalid
from sppruner.vqa import references_of, score

# Reference columns as they are committed: `answers` keeps its name, `answer` gives way to ours.
_REFERENCES = ("answers", "source_answers", "source_answer")
RECORDS = "json"
"""Column of a WebDataset corpus: each sample's record, which may have the answers beside the
question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Accuracy over the rows of a run, scored by `sppruner.vqa` from the committed answers: a kept
    summary of another version may have another figure."""

    scored: int
    """Rows with a reference; an error row with one counts as wrong."""

    mean: float
    """Mean score in [0, 1]; 0.0 without such rows."""


def reference_column(mapping: ColumnMapping) -> str | None:
    """The committed column that holds reference answers, if there is one; else RECORDS, where these
    hold the questions."""
    known = (*_REFERENCES, RECORDS) if mapping.question == RECORDS else _REFERENCES
    return next((name for name in known if name in mapping.schema.names), None)


def answers_of_records(records: pa.ChunkedArray) -> pa.Array:
    """What each record has as `answers`, or as `answer`: a list of texts, empty where that is
    nothing or the record is no JSON object."""
    return pa.array(map(_answers_of_record, records.to_pylist()), pa.list_(pa.string()))


def _answers_of_record(text: str | None) -> list[str]:
    with suppress(ValueError, RecursionError):
        record = json.loads(text or "")
        if isinstance(record, dict):
            known = references_of(record.get("answers")) or references_of(record.get("answer"))
            return [replace_invalid(answer) for answer in known]
    return []


def measure(rows: Iterable[tuple[str | None, object]]) -> Accuracy:
    """Mean score over the rows that have references, from each row's answer and references in any
    form that `references_of` reads."""
    scored, total = 0, 0.0
    for answer, reference in rows:
        known = references_of(reference)
        if known:
            scored += 1
            total += score(answer, known)
    return Accuracy(scored=scored, mean=total / scored if scored else 0.0)
