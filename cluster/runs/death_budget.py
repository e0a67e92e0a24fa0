"""The death budget: a run whose replicas only die is stopped, with what happened to the last ones.

Answered rows refill it, so that rows which kill replicas here and there never stop a run.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from cluster.errors import FleetUnstable

_MOST: Final = 64.0
# Five deaths isolate a row that kills replicas: this refill keeps up with one such row in ten.
_PER_ANSWER: Final = 0.5
_HUNG_COST: Final = 8.0
_REMEMBERED: Final = 3


class DeathBudget:
    """Faults that may still happen before the next answers.

    The death of a replica ends all calls that it holds, and a lost node all its replicas at once.
    Calls therefore name the `generation` in which they were sent, and of each generation only the
    first fault is spent; it begins the next.
    """

    def __init__(self, most: float = _MOST) -> None:
        """most: deaths without an answered row between them."""
        self._most = most
        self._left = most
        self._last: deque[str] = deque(maxlen=_REMEMBERED)
        self.generation = 0

    def refill(self, rows: int) -> None:
        """Rows were answered."""
        self._left = min(self._most, self._left + _PER_ANSWER * rows)

    def spend(self, generation: int, reason: str, *, hung: bool = False) -> None:
        """A call that was sent in this generation got no answer; hung: it took its whole deadline
        to find out. Raises as `check` does."""
        if generation == self.generation:
            self.generation += 1
            self._left -= _HUNG_COST if hung else 1.0
            self._last.append(reason)
        self.check()

    def check(self) -> None:
        """Raises FleetUnstable if nothing is left."""
        if self._left <= 0:
            raise FleetUnstable(
                f"replicas died or hung {self.generation} times, and since the last answers as "
                f"often as this run allows; the last faults: {'; '.join(self._last)}. The "
                "replicas' logs say why (memory, device, driver). Once that is mended, the same "
                "command resumes"
            )
