"""How much longer a decode step takes with more rows: on most hardware hardly, up to a number.

Steps are compared as they were measured, by numbers of rows up to each power of two. No line is
fitted: between one row and two there may be a jump, and from two to sixteen none.
"""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median
from typing import Final

_LATEST: Final = 15
"""Steps of each size whose median counts."""
_FEWEST: Final = 3


class DecodePace:
    """Remembers what the latest steps of each size took."""

    def __init__(self) -> None:
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_LATEST))

    def observe(self, rows: int, seconds: float) -> None:
        """A step of so many rows was done."""
        self._seconds[_size(rows)].append(seconds)

    def rows_beside(self, urgent: int, slack: float) -> int:
        """How many more rows a step may have for taking at most 1 + `slack` times as long as that
        of `urgent` rows; 0 where too little was seen."""
        alone = self._median(_size(urgent))
        if alone is None:
            return 0
        most = urgent
        for size in self._seconds:
            seconds = self._median(size)
            if seconds is not None and seconds <= alone * (1 + slack):
                most = max(most, 1 << size)
        return most - urgent

    def _median(self, size: int) -> float | None:
        seen = self._seconds.get(size, ())
        return median(seen) if len(seen) >= _FEWEST else None


def _size(rows: int) -> int:
    """The exponent of the smallest power of two that is not smaller."""
    return (rows - 1).bit_length()
