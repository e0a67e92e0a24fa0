"""The measured speed-up: dense over pruned seconds of control blocks, with its interval.

The ratio is of sums. With it, and not with the mean of the blocks' ratios, a run's seconds are
multiplied: in a corpus of small and large images a block of large ones counts as many times as it
takes longer. With w_i the share of block i in the pruned sum, and v_i that in the dense one, the
variance of the ratio's logarithm is about the sum of (v_i - w_i) ** 2 (linearised). Each difference
is divided by 1 - w_i, since a block draws the ratio to itself by its own weight. The interval is
Student's t, with the degrees of freedom of 1 / sum(w_i ** 2) blocks of equal weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Final, NamedTuple

import numpy as np

FEWEST_BLOCKS: Final = 5
"""Fewer say too little of their own spread: there is no interval."""
CONFIDENCE: Final = 0.95
"""Of every interval, unless several are judged together."""
# A factor of a million either way: such an interval says nothing.
_WIDEST: Final = 14.0
NANO: Final = 1_000_000_000
"""Nanoseconds of a second."""


class Block(NamedTuple):
    """Contiguous rows of the corpus that one replica answered both ways, one after the other."""

    pruned: int
    """Nanoseconds of the pruned answers, at the pace of the steady part."""
    dense: int
    """Nanoseconds of the dense answers, at the pace of theirs."""
    rows: int
    """Rows that were answered both ways."""
    device: str = ""
    """The replica's kind of device."""

    @classmethod
    def at_pace(
        cls,
        pruned: Iterable[float | None],
        dense: Iterable[float | None],
        *,
        rows: int,
        device: str,
    ) -> list[Block]:
        """A block of so many rows that were answered both ways; nothing where none were. pruned,
        dense: their `steady_seconds`, None of an answer that is not in its arm's steady part."""
        arms = [[seconds for seconds in arm if seconds is not None] for arm in (pruned, dense)]
        if not all(arms):
            return []
        of_rows = [nanoseconds(rows * fsum(arm) / len(arm)) for arm in arms]
        return [cls(pruned=of_rows[0], dense=of_rows[1], rows=rows, device=device)]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRatio:
    """Dense over pruned seconds of the same rows: above 1 pruning was faster."""

    ratio: float
    """Summed dense seconds over summed pruned seconds."""
    low: float | None
    """Lower end of the interval; None below five blocks, or where these say nothing."""
    high: float | None
    """Upper end of the interval; None where `low` is."""
    rows: int
    """Control rows measured."""
    blocks: int
    """Blocks that these rows are of."""
    confidence: float = CONFIDENCE
    """Of the interval."""

    @property
    def half_width(self) -> float | None:
        """Of the interval of the ratio's logarithm: 0.1 is about 10 % either way. None without an
        interval."""
        if self.low is None or self.high is None:
            return None
        return math.log(self.high / self.low) / 2


def nanoseconds(seconds: float) -> int:
    """Seconds as ledgers add them up."""
    return round(seconds * NANO)


def measured_ratio(
    blocks: Sequence[Block],
    *,
    seconds: Mapping[str, float] | None = None,
    confidence: float = CONFIDENCE,
) -> MeasuredRatio | None:
    """The ratio of control blocks; None without any.

    seconds: pruned ones of all rows by kind of device. Where the blocks are of several kinds, with
    five or more of each that has seconds, these are strata: the ratio is that of the whole run, in
    whatever shares blocks and rows met them. Otherwise all blocks are taken together.
    """
    strata = _strata(blocks, seconds or {})
    parts = [_estimate([block for block in blocks if block.device in kind]) for kind, _ in strata]
    weights = np.array([weight for _, weight in strata])
    ratios = np.array([part.ratio for part in parts])
    if not len(parts) or not np.isfinite(ratios).all():
        return None
    ratio = float(weights @ ratios)
    low = high = None
    if all(part.freedom is not None for part in parts) and ratio:
        variances = np.array([part.variance for part in parts]) * (weights * ratios / ratio) ** 2
        freedoms = np.array([part.freedom for part in parts], dtype=np.float64)
        half = _half_width(variances, freedoms, confidence)
        if half < _WIDEST:
            low, high = (float(ratio * np.exp(side * half)) for side in (-1, 1))
    rows = sum(block.rows for block in blocks)
    return MeasuredRatio(
        ratio=ratio, low=low, high=high, rows=rows, blocks=len(blocks), confidence=confidence
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Estimate:
    """variance: of the ratio's logarithm, with its degrees of freedom; None for too few blocks, or
    where one of them is all."""

    ratio: float
    variance: float = 0.0
    freedom: float | None = None


def _strata(
    blocks: Sequence[Block], seconds: Mapping[str, float]
) -> list[tuple[frozenset[str], float]]:
    """Kinds of device that are estimated together, with their shares of the seconds."""
    counts = Counter(block.device for block in blocks)
    spent = {kind: amount for kind, amount in seconds.items() if amount > 0}
    if len(spent) > 1 and all(counts[kind] >= FEWEST_BLOCKS for kind in spent):
        whole = sum(spent.values())
        return [(frozenset({kind}), amount / whole) for kind, amount in sorted(spent.items())]
    return [(frozenset(counts), 1.0)] if counts else []


def _estimate(blocks: Sequence[Block]) -> _Estimate:
    # Sorted, the result does not depend on the order in which units were added.
    seconds = np.array(sorted((b.pruned, b.dense) for b in blocks), dtype=np.float64) / NANO
    pruned, dense = seconds.sum(axis=0)
    if not pruned:
        return _Estimate(ratio=math.nan)
    if len(seconds) < FEWEST_BLOCKS or not dense or seconds[:, 0].max() >= pruned:
        return _Estimate(ratio=float(dense / pruned))
    shares = seconds / seconds.sum(axis=0)
    weights = shares[:, 0]
    return _Estimate(
        ratio=float(dense / pruned),
        variance=float((((shares[:, 1] - weights) / (1 - weights)) ** 2).sum()),
        freedom=max(1.0, 1 / float((weights**2).sum()) - 1),
    )


def _half_width(variances: np.ndarray, freedoms: np.ndarray, confidence: float) -> float:
    """Of the interval of the ratio's logarithm: strata of these variances and degrees of freedom
    together (Satterthwaite)."""
    # Imported here: it takes half a second, of every process that reads a ledger.
    from scipy.special import stdtrit

    variance = float(variances.sum())
    if not variance:
        return 0.0
    freedom = variance**2 / float((variances**2 / freedoms).sum())
    return float(stdtrit(freedom, (1 + confidence) / 2)) * variance**0.5
