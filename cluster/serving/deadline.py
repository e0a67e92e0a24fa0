"""How long a piece of work may take: by what the same took before, within bounds."""

from __future__ import annotations

from typing import Final

_TIMES_SLOWEST: Final = 20


class Deadline:
    """Seconds after which a piece of work counts as hung.

    `first` until `learning` pieces were done; then 20 times the slowest of them, from `least` up to
    `first`, or up to twice the slowest where that is longer: one very slow piece must not make the
    next hang last for days.
    """

    def __init__(self, *, first: float, least: float, learning: int = 1) -> None:
        """first, least: seconds. learning: pieces of work that may be slower than all later ones,
        because something is compiled or allocated."""
        self._first = max(first, least)
        self._least = least
        self._learning = learning
        self._slowest = 0.0

    @property
    def seconds(self) -> float:
        """The longest that the next piece of work may take."""
        if self._learning > 0:
            return max(self._first, 2 * self._slowest)
        most = max(self._first, 2 * self._slowest)
        return max(self._least, min(_TIMES_SLOWEST * self._slowest, most))

    def observe(self, seconds: float) -> None:
        """Records what a piece of work took."""
        self._learning -= 1
        self._slowest = max(self._slowest, seconds)
