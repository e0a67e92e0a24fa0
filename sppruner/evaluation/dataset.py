"""What is asked: questions about images, in a form every dataset comes down to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image

from sppruner.evaluation.metrics import Metric

Outline: TypeAlias = tuple[tuple[float, float], ...]
"""Corners (x, y) of something in an image, as fractions of its sides."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Item:
    """One question. group: what intervals resample, a scene or an image with all its questions.

    answers: the right answer, or what each annotator said. image: decodes the image when it is
    needed; a benchmark's images do not fit in memory. subjects: outlines of what the question asks
    about, where that is known. apart: reported by its kind only, not part of the accuracy.
    """

    id: str
    group: str
    kind: str
    prompt: str
    answers: tuple[str, ...]
    image: Callable[[], Image.Image]
    subjects: tuple[Outline, ...] = ()
    apart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """Items that are scored alike. max_new_tokens: how long an answer may get."""

    name: str
    items: Sequence[Item]
    metric: Metric
    max_new_tokens: int = 16

    @property
    def questions(self) -> int:
        """Items that are part of the accuracy."""
        return sum(not item.apart for item in self.items)

    def majority(self) -> dict[str, float]:
        """Per kind, what always giving its most frequent answer would score; empty for metrics
        that compare with several answers."""
        if not self.metric.single_answer:
            return {}
        answers: dict[str, Counter[str]] = {}
        for item in self.items:
            answers.setdefault(item.kind, Counter())[item.answers[0]] += 1
        return {kind: max(counter.values()) / counter.total() for kind, counter in answers.items()}
