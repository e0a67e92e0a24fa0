"""How much longer a decode step takes with more rows: on most hardware hardly, up to a number."""

from __future__ import annotations

from typing import Final

_KEPT: Final = 0.98
"""Of the weight of earlier steps, with each step."""
_LEAST_SPREAD: Final = 0.5
_MANY: Final = 1 << 30


class DecodePace:
    """Fits seconds = fixed + slope * rows to the latest steps."""

    def __init__(self) -> None:
        self._weight = self._rows = self._squares = self._seconds = self._products = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """A step of so many rows was done."""
        for name, value in (
            ("_weight", 1.0),
            ("_rows", rows),
            ("_squares", rows * rows),
            ("_seconds", seconds),
            ("_products", rows * seconds),
        ):
            setattr(self, name, _KEPT * getattr(self, name) + value)

    def rows_beside(self, urgent: int, slack: float) -> int:
        """How many more rows a step may have for taking at most 1 + `slack` times as long as that
        of `urgent` rows; 0 where too little was seen."""
        if not self._weight:
            return 0
        mean = self._rows / self._weight
        spread = self._squares / self._weight - mean * mean
        if spread < _LEAST_SPREAD:
            return 0
        mean_seconds = self._seconds / self._weight
        slope = (self._products / self._weight - mean * mean_seconds) / spread
        alone = mean_seconds + slope * (urgent - mean)
        if slope <= 0:
            return _MANY
        return max(0, int(slack * alone / slope))
