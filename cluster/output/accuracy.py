"""Accuracy of short answers where the corpus has references."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

# Reference columns as they are committed: `answers` keeps its name, `answer` gives way to ours.
_REFERENCES = ("answers", "source_answers", "source_answer")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """scored: rows with a reference; an error row with one counts as wrong. mean: in [0, 1]."""

    scored: int
    mean: float


def normalise(text: str) -> str:
    """Lower case, no punctuation but digits' own, no articles, single spaces (VQA's rules,
    without its tables of number words and contractions)."""
    kept = re.sub(r"[^\w\s.'-]", " ", text.lower()).strip().rstrip(".")
    return " ".join(_ARTICLES.sub(" ", kept).split())


def score(answer: str | None, references: Sequence[str]) -> float:
    """Exact match with one of up to two references; with more, VQA's min(agreeing / 3, 1) averaged
    over leaving each annotator out (Antol et al. 2015)."""
    given = normalise(answer or "")
    known = [normalise(reference) for reference in references]
    if len(known) < 3:
        return float(given in known)
    agreeing = sum(reference == given for reference in known)
    per_subset = [min((agreeing - (reference == given)) / 3, 1.0) for reference in known]
    return sum(per_subset) / len(known)


def reference_column(schema: pa.Schema) -> str | None:
    """The committed column that holds reference answers, if there is one."""
    return next((name for name in _REFERENCES if name in schema.names), None)


def measure(answers: Sequence[str | None], references: Sequence[object]) -> Accuracy:
    """Mean score over the rows that have references; each is a string or a list of strings."""
    scores = [
        score(answer, [reference] if isinstance(reference, str) else list(reference))  # type: ignore[call-overload]
        for answer, reference in zip(answers, references, strict=True)
        if reference
    ]
    return Accuracy(scored=len(scores), mean=sum(scores) / len(scores) if scores else 0.0)
