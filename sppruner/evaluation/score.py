"""What answers are worth, and how sure we can be.

Questions about one image are not independent, so intervals resample images (groups of items), not
questions; scores on the same items are compared on the same resamples (paired bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sppruner.evaluation.answering import Answer
from sppruner.evaluation.dataset import Dataset
from sppruner.spec import PruneSpec

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Score:
    """One spec's answers to a dataset: one list in the items' order per repeat (random seeds).

    Items set apart (captions among questions) are reported by kind and stay out of `accuracy`.
    """

    spec: PruneSpec
    dataset: Dataset
    repeats: Sequence[Sequence[Answer]]
    per_item: np.ndarray = field(init=False, repr=False)
    _by_group: tuple[np.ndarray, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        items, metric = self.dataset.items, self.dataset.metric
        worth = [
            [metric.score(a.text, item.answers) for item, a in zip(items, answers, strict=True)]
            for answers in self.repeats
        ]
        per_item = np.array(worth, dtype=float).mean(axis=0)
        object.__setattr__(self, "per_item", per_item)
        place = {group: i for i, group in enumerate(dict.fromkeys(i.group for i in items))}
        right, asked = np.zeros(len(place)), np.zeros(len(place))
        for item, value in zip(items, per_item, strict=True):
            if not item.apart:
                right[place[item.group]] += value
                asked[place[item.group]] += 1
        object.__setattr__(self, "_by_group", (right, asked))

    @property
    def n(self) -> int:
        """Questions answered, repeats included."""
        return self.dataset.questions * len(self.repeats)

    @property
    def accuracy(self) -> float:
        right, asked = self._by_group
        return float(right.sum() / asked.sum())

    @property
    def kept_share(self) -> float:
        kept = sum(a.kept for answers in self.repeats for a in answers)
        return kept / sum(a.total for answers in self.repeats for a in answers)

    def mean(self, of: Callable[[Answer], float | None]) -> float | None:
        """Mean of a figure of each answer to an item that is not set apart, over those that have
        it; None if none has."""
        values = [
            value
            for answers in self.repeats
            for item, answer in zip(self.dataset.items, answers, strict=True)
            if not item.apart and (value := of(answer)) is not None
        ]
        return float(np.mean(values)) if values else None

    def by_type(self) -> dict[str, float]:
        kinds = np.array([item.kind for item in self.dataset.items])
        return {str(kind): float(self.per_item[kinds == kind].mean()) for kind in np.unique(kinds)}

    def worst_type(self, dense: Score) -> tuple[str, float] | None:
        """The kind that keeps the smallest share of its dense accuracy, captions included."""
        base = dense.by_type()
        shares = {kind: got / base[kind] for kind, got in self.by_type().items() if base[kind]}
        return min(shares.items(), key=lambda pair: pair[1]) if shares else None

    def metrics(self) -> dict[str, float]:
        """The metric's figures of the whole set, mean over repeats."""
        kept = [i for i, item in enumerate(self.dataset.items) if not item.apart]
        answers = [self.dataset.items[i].answers for i in kept]
        each = [
            self.dataset.metric.summary([repeat[i].text for i in kept], answers)
            for repeat in self.repeats
        ]
        return {name: float(np.mean([one[name] for one in each])) for name in each[0]}

    def resampled(self, seed: int = 0) -> np.ndarray:
        """Accuracies on bootstrap resamples of groups; the same seed draws the same groups, so two
        scores on the same items are paired."""
        right, asked = self._by_group
        # Groups with nothing but items set apart carry no accuracy.
        right, asked = right[asked > 0], asked[asked > 0]
        draws = np.random.default_rng(seed).integers(0, len(right), (_RESAMPLES, len(right)))
        return right[draws].sum(axis=1) / asked[draws].sum(axis=1)

    def interval(self) -> Share:
        return _share(self.accuracy, self.resampled())

    def relative_to(self, dense: Score) -> Share | None:
        """Accuracy as a share of dense accuracy. None where dense answers next to nothing: a share
        of zero says nothing."""
        base = dense.resampled()
        if not base.all():
            return None
        return _share(self.accuracy / dense.accuracy, self.resampled() / base)

    def ahead_of(self, other: Score) -> Share:
        """How much more accurate than another score on the same items."""
        return _share(self.accuracy - other.accuracy, self.resampled() - other.resampled())


def _share(value: float, resampled: np.ndarray) -> Share:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Share(value=value, low=float(low), high=float(high))
