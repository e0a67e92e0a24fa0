"""Accuracy of one spec's answers, with bootstrap intervals.

Questions about one image are not independent, so intervals resample images (groups of items), not
questions. Scores on the same items are compared on the same resamples (paired bootstrap).
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
class Estimate:
    """A figure with its 95 % bootstrap interval."""

    value: float
    """The figure on all items."""
    low: float
    """The 2.5 % quantile of the resamples."""
    high: float
    """The 97.5 % quantile of the resamples."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpecScore:
    """The score of one spec on a dataset.

    Items marked `separate` (captions among questions) are reported by kind and are not part of
    `accuracy`.
    """

    spec: PruneSpec
    """The spec that was evaluated; DENSE for the full model."""
    dataset: Dataset
    """The items and their metric."""
    repeats: Sequence[Sequence[Answer]]
    """One list of answers, in the items' order, per repeat (random seed)."""
    per_item: np.ndarray = field(init=False, repr=False)
    """Score of each item, mean over repeats."""
    _by_group: tuple[np.ndarray, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        items, metric = self.dataset.items, self.dataset.metric
        scores = [
            [metric.score(a.text, item.answers) for item, a in zip(items, answers, strict=True)]
            for answers in self.repeats
        ]
        per_item = np.array(scores, dtype=float).mean(axis=0)
        object.__setattr__(self, "per_item", per_item)
        index = {group: i for i, group in enumerate(dict.fromkeys(i.group for i in items))}
        right, total = np.zeros(len(index)), np.zeros(len(index))
        for item, value in zip(items, per_item, strict=True):
            if not item.separate:
                right[index[item.group]] += value
                total[index[item.group]] += 1
        object.__setattr__(self, "_by_group", (right, total))

    @property
    def n(self) -> int:
        """Questions answered, repeats included."""
        return self.dataset.question_count * len(self.repeats)

    @property
    def accuracy(self) -> float:
        """Mean score of the items that are not `separate`."""
        right, total = self._by_group
        return float(right.sum() / total.sum())

    @property
    def kept_share(self) -> float:
        """Visual tokens kept over all visual tokens, as the budget counts them."""
        kept = sum(a.kept for answers in self.repeats for a in answers)
        return kept / sum(a.total for answers in self.repeats for a in answers)

    def mean(self, figure: Callable[[Answer], float | None]) -> float | None:
        """Mean of a figure over the answers to items that are not `separate`. Answers whose figure
        is None are skipped; None if all are."""
        values = [
            value
            for answers in self.repeats
            for item, answer in zip(self.dataset.items, answers, strict=True)
            if not item.separate and (value := figure(answer)) is not None
        ]
        return float(np.mean(values)) if values else None

    def by_type(self) -> dict[str, float]:
        """Mean score of each kind, `separate` ones included."""
        kinds = np.array([item.kind for item in self.dataset.items])
        return {str(kind): float(self.per_item[kinds == kind].mean()) for kind in np.unique(kinds)}

    def worst_type(self, dense: SpecScore) -> tuple[str, float] | None:
        """The kind that keeps the smallest share of its dense score, with that share; captions
        included. None if dense scores 0 on every kind."""
        base = dense.by_type()
        shares = {kind: own / base[kind] for kind, own in self.by_type().items() if base[kind]}
        return min(shares.items(), key=lambda pair: pair[1]) if shares else None

    def metrics(self) -> dict[str, float]:
        """The metric's figures of the whole set (`Metric.summary`), mean over repeats."""
        counted = [i for i, item in enumerate(self.dataset.items) if not item.separate]
        answers = [self.dataset.items[i].answers for i in counted]
        summaries = [
            self.dataset.metric.summary([repeat[i].text for i in counted], answers)
            for repeat in self.repeats
        ]
        return {name: float(np.mean([s[name] for s in summaries])) for name in summaries[0]}

    def bootstrap(self, seed: int = 0) -> np.ndarray:
        """Accuracies on bootstrap resamples of groups. The same seed draws the same groups, so the
        resamples of two scores on the same items are paired."""
        right, total = self._by_group
        # A group of `separate` items only has no accuracy.
        right, total = right[total > 0], total[total > 0]
        draws = np.random.default_rng(seed).integers(0, len(right), (_RESAMPLES, len(right)))
        return right[draws].sum(axis=1) / total[draws].sum(axis=1)

    def interval(self) -> Estimate:
        """The accuracy with its interval."""
        return _estimate(self.accuracy, self.bootstrap())

    def relative_to(self, dense: SpecScore) -> Estimate | None:
        """Accuracy as a share of dense accuracy. None if dense has accuracy 0 on any resample: a
        share of zero is undefined."""
        base = dense.bootstrap()
        if not base.all():
            return None
        return _estimate(self.accuracy / dense.accuracy, self.bootstrap() / base)

    def difference_to(self, other: SpecScore) -> Estimate:
        """Accuracy minus that of another score on the same items."""
        return _estimate(self.accuracy - other.accuracy, self.bootstrap() - other.bootstrap())


def _estimate(value: float, resamples: np.ndarray) -> Estimate:
    low, high = np.quantile(resamples, [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))
