"""Questions about images, in the one form that every dataset is converted to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image

from sppruner.evaluation.metrics import Metric

Outline: TypeAlias = tuple[tuple[float, float], ...]
"""Corners (x, y) of an object in an image, as fractions of the image's sides."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Item:
    """One question about one image."""

    id: str
    """Unique within the dataset."""
    group: str
    """The unit that intervals resample: one scene or image with all its questions."""
    kind: str
    """The question type, by which accuracy is also reported."""
    prompt: str
    """The text for the model, the benchmark's instruction included."""
    answers: tuple[str, ...]
    """The right answer, or the answer of each annotator."""
    image: Callable[[], Image.Image]
    """Decodes the image on demand: a benchmark's images do not fit in memory."""
    subjects: tuple[Outline, ...] = ()
    """Outlines of the objects that the answer depends on; empty if unknown."""
    separate: bool = False
    """Reported by kind only and excluded from the accuracy, as captions among questions are."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """Items that share a metric."""

    name: str
    """As reported."""
    items: Sequence[Item]
    """All questions, in the order of their source."""
    metric: Metric
    """Scores one answer, and the whole set."""
    max_new_tokens: int = 16
    """The longest answer that is generated, in tokens."""

    @property
    def question_count(self) -> int:
        """The number of items that are part of the accuracy."""
        return sum(not item.separate for item in self.items)

    def majority_baseline(self) -> dict[str, float]:
        """Per kind, the accuracy of always giving its most frequent answer; empty for metrics that
        compare with several answers."""
        if not self.metric.single_answer:
            return {}
        answers: dict[str, Counter[str]] = {}
        for item in self.items:
            answers.setdefault(item.kind, Counter())[item.answers[0]] += 1
        return {kind: max(counter.values()) / counter.total() for kind, counter in answers.items()}
