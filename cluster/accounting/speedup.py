"""The measured speed-up: dense over pruned seconds of control rows, with its interval.

The ratio is of sums. With it, and not with the mean of the batches' ratios, a run's seconds are
multiplied: in a corpus of small and large images a batch of large ones counts as many times as it
takes longer. With w_i the share of batch i in the pruned sum, and v_i that in the dense one, the
variance of the ratio's logarithm is about the sum of (v_i - w_i) ** 2 (linearised). Each difference
is divided by 1 - w_i, since a batch draws the ratio to itself by its own weight. The interval is
Student's t, with the degrees of freedom of 1 / sum(w_i ** 2) batches of equal weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

FEWEST_BATCHES: Final = 5
"""Fewer say too little of their own spread: there is no interval."""
CONFIDENCE: Final = 0.95
"""Of every interval, unless several are judged together."""
# A factor of a million either way: such an interval says nothing.
_WIDEST: Final = 14.0
NANO: Final = 1_000_000_000
"""Nanoseconds of a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRatio:
    """Dense over pruned seconds of the same rows: above 1 pruning was faster."""

    ratio: float
    """Summed dense seconds over summed pruned seconds."""
    low: float | None
    """Lower end of the interval; None below five batches, or where these say nothing."""
    high: float | None
    """Upper end of the interval; None where `low` is."""
    rows: int
    """Control rows measured."""
    batches: int
    """Batches that these rows ran in."""


def nanoseconds(seconds: float) -> int:
    """Seconds as ledgers add them up."""
    return round(seconds * NANO)


def measured_ratio(
    pairs: Sequence[tuple[int, int]], *, confidence: float = CONFIDENCE
) -> MeasuredRatio | None:
    """The ratio of control rows, from each row's (pruned, dense) nanoseconds; None without any."""
    if not pairs or not sum(pruned for pruned, _ in pairs):
        return None
    # Rows of one batch share their seconds to the nanosecond: equal pairs are one observation.
    # Sorted by np.unique, the result does not depend on the order in which units were added.
    batches, rows = np.unique(np.array(pairs, dtype=np.int64), axis=0, return_counts=True)
    seconds = batches * rows[:, None] / NANO
    pruned, dense = seconds.sum(axis=0)
    low = high = None
    if len(seconds) >= FEWEST_BATCHES and dense and seconds[:, 0].max() < pruned:
        half = _half_width(seconds / seconds.sum(axis=0), confidence)
        if half < _WIDEST:
            low, high = (float(dense / pruned * np.exp(side * half)) for side in (-1, 1))
    return MeasuredRatio(
        ratio=float(dense / pruned), low=low, high=high, rows=len(pairs), batches=len(seconds)
    )


def _half_width(shares: np.ndarray, confidence: float) -> float:
    """Of the interval of the ratio's logarithm. shares: of each batch in the sums, pruned and
    dense."""
    # Imported here: it takes half a second, of every process that reads a ledger.
    from scipy.special import stdtrit

    pruned, dense = shares.T
    variance = float((((dense - pruned) / (1 - pruned)) ** 2).sum())
    freedom = max(1.0, 1 / float((pruned**2).sum()) - 1)
    return float(stdtrit(freedom, (1 + confidence) / 2)) * variance**0.5
