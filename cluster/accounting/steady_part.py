"""The steady part of a control block's arm: what its answers take once the replica is full, and
before it runs empty.

An arm begins at an idle replica, whose first images are still to be decoded, and ends with slots
that fall empty one after the other. A run of millions of rows does either once; a block of a few
hundred pays for both twice, by equal amounts, which would draw every measured ratio towards 1.

A short block has no such part: once every slot has answered, some are empty for good, and what is
left is decoding without any prefill, whose ratio is none that a run has. Its arms count whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Final

BLOCK_SLOTS: Final = 4
"""Rows of a control block for each slot of its replica: the steady part, which is the middle half
of an arm's answers, begins once every slot has answered and ends while all are taken."""
# Arms with fewer rows a slot count whole: some of a block's rows may fail, and have no answers.
_FEWEST_SLOTS: Final = 3
# Answers of one step of the engine arrive within this share of the arm's time.
_TOGETHER: Final = 0.01


def steady_seconds(ended: Mapping[str, float], began: float, *, slots: int) -> dict[str, float]:
    """Seconds that each answer of the steady part came after the one before it.

    ended: when each answer of an arm came, by row, in seconds by the clock of `began`, when the arm
    began. slots: rows that its replica runs at once. The sum over the result is the time that as
    many rows take of a full replica. Answers that come together, as those of one batch, are in the
    steady part together or not at all. All of an arm counts where it is one batch, or has fewer
    than three rows a slot.
    """
    order = sorted(ended, key=ended.__getitem__)
    times = [ended[row] for row in order]
    lead = slots if len(times) >= _FEWEST_SLOTS * slots else 0
    first, last = 0, len(times)
    if lead:
        together = _TOGETHER * (times[-1] - began)
        # How many answers had come by the end of the batch that each boundary falls into.
        ends = [bisect_right(times, times[n - 1] + together) for n in (lead, len(times) - lead)]
        if ends[0] < ends[1]:
            first, last = ends
    before = [began, *times][first:last]
    return {
        row: time - earlier
        for row, time, earlier in zip(order[first:last], times[first:last], before, strict=True)
    }
