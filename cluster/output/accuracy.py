"""Accuracy of short answers where the corpus has references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from sppruner.vqa import references_of, score

# Reference columns as they are committed: `answers` keeps its name, `answer` gives way to ours.
_REFERENCES = ("answers", "source_answers", "source_answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Accuracy over the rows of a run, scored by `sppruner.vqa` from the committed answers: a kept
    summary of another version may have another figure."""

    scored: int
    """Rows with a reference; an error row with one counts as wrong."""

    mean: float
    """Mean score in [0, 1]; 0.0 without such rows."""


def reference_column(schema: pa.Schema) -> str | None:
    """The committed column that holds reference answers, if there is one."""
    return next((name for name in _REFERENCES if name in schema.names), None)


def measure(answers: Sequence[str | None], references: Sequence[object]) -> Accuracy:
    """Mean score over the rows that have references, in any form `references_of` reads."""
    scores = [
        score(answer, known)
        for answer, reference in zip(answers, references, strict=True)
        if (known := references_of(reference))
    ]
    return Accuracy(scored=len(scores), mean=sum(scores) / len(scores) if scores else 0.0)
