"""How urgent requests and others share an engine's time.

Urgent ones go first, and alone: others keep their slots and wait. But never for ever: of the time
in which both have work others are given a share.
"""

from __future__ import annotations

from typing import Final

OTHERS_SHARE: Final = 0.2
"""Of the time in which urgent requests have work too."""


class PriorityShare:
    """Told of every piece of work that was done while both had some, it says whose is next."""

    def __init__(self, share: float = OTHERS_SHARE) -> None:
        self._share = share
        self._owed = 0.0  # seconds that others have had too few; negative where too many

    @property
    def others_next(self) -> bool:
        """Whether the next piece of work is theirs, or everybody's."""
        return self._owed > 0

    def spent(self, seconds: float, *, by_others: bool) -> None:
        """by_others: whether they took part."""
        self._owed += self._share * seconds - (seconds if by_others else 0.0)

    def end(self) -> None:
        """Only one side has work: nobody is owed anything."""
        self._owed = 0.0
