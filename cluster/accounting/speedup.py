"""The measured speed-up: dense over pruned seconds of control rows, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

RESAMPLES: Final = 2_000
"""Bootstrap samples behind an interval."""
NANO: Final = 1_000_000_000
"""Nanoseconds of a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRatio:
    """Dense over pruned seconds of the same rows: above 1 pruning was faster.

    The seconds of a row are those of its batch, divided by its rows. The interval therefore
    resamples batches.
    """

    ratio: float
    """Summed dense seconds over summed pruned seconds."""
    low: float | None
    """Lower end of the 95 % bootstrap interval; None below two batches."""
    high: float | None
    """Upper end of the 95 % bootstrap interval; None below two batches."""
    rows: int
    """Control rows measured."""
    batches: int
    """Batches that these rows ran in."""


def nanoseconds(seconds: float) -> int:
    """Seconds as ledgers add them up."""
    return round(seconds * NANO)


def measured_ratio(pairs: Sequence[tuple[int, int]], seed: int = 0) -> MeasuredRatio | None:
    """The ratio of control rows, from each row's (pruned, dense) nanoseconds; None without any."""
    if not pairs or not sum(pruned for pruned, _ in pairs):
        return None
    # Rows of one batch share their seconds to the nanosecond: equal pairs are one observation.
    # Sorted by np.unique, the result does not depend on the order in which units were added.
    batches, rows = np.unique(np.array(pairs, dtype=np.int64), axis=0, return_counts=True)
    seconds = batches * rows[:, None] / NANO
    low = high = None
    if len(seconds) > 1:
        generator = np.random.default_rng(seed)
        ratios = np.empty(RESAMPLES)
        for number in range(RESAMPLES):
            drawn = seconds[generator.integers(0, len(seconds), len(seconds))].sum(axis=0)
            ratios[number] = drawn[1] / drawn[0]
        low, high = (float(bound) for bound in np.percentile(ratios, [2.5, 97.5]))
    pruned, dense = seconds.sum(axis=0)
    return MeasuredRatio(
        ratio=float(dense / pruned), low=low, high=high, rows=len(pairs), batches=len(seconds)
    )
