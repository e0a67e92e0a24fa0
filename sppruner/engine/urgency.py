"""Who takes part in an engine's next piece of work: urgent requests first, and hardly slowed down.

While urgent requests run, less urgent ones keep what they have and wait, but for three things: a
decode step takes as many of them as make it hardly longer; of the time they are given a share
(`PriorityShare`); and where nobody urgent runs they have all of it, in prefills that are kept short
while somebody urgent may come at any moment.

Priorities are numbers, smaller ones more urgent; those of running requests are given in order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Final

from sppruner.engine.decode_pace import DecodePace
from sppruner.engine.prefill_pace import PrefillPace
from sppruner.engine.priority_share import PriorityShare

# A decode step of urgent requests may take so much longer for those that are not.
_SLACK: Final = 0.2
# For so long after an urgent request came, prefills of others are kept short.
_RECENT_SECONDS: Final = 10.0
_SHORT_PREFILL: Final = 0.03


class Urgency:
    """pauses: whether a step of fewer requests is any quicker, as a captured one is not."""

    def __init__(self, *, pauses: bool) -> None:
        self._pauses = pauses
        self._share = PriorityShare()
        self._prefills, self._steps = PrefillPace(), DecodePace()
        self._came, self._urgent = -math.inf, 0
        self._others_turn = False

    def submitted(self, priority: int, running: Sequence[int]) -> None:
        """A request came while these run."""
        if running and running[-1] > priority:
            self._came, self._urgent = time.monotonic(), priority

    def prefill_priority(self, waiting: Sequence[int], running: Sequence[int]) -> int | None:
        """Whose prefill may come next, of the priorities that wait, in order; None where all of
        them are paused."""
        urgent = min([*waiting[:1], *running[:1]])
        others = [priority for priority in waiting if priority > urgent]
        if others and self._share.others_next:
            return others[0]
        return None if waiting[0] > urgent else waiting[0]

    def prefill_tokens(self, priority: int) -> int | None:
        """Most tokens of a prefill of that priority; None for no bound but the engine's own."""
        recent = time.monotonic() - self._came < _RECENT_SECONDS
        return self._prefills.tokens(_SHORT_PREFILL) if recent and priority > self._urgent else None

    def decode_rows(self, running: Sequence[int]) -> int:
        """How many of the first running requests decode next."""
        urgent = sum(priority == running[0] for priority in running)
        self._others_turn = urgent < len(running) and self._share.others_next
        if urgent == len(running) or not self._pauses or self._others_turn:
            return len(running)
        return min(len(running), urgent + self._steps.rows_beside(urgent, _SLACK))

    def prefilled(
        self, priority: int, present: Sequence[int], *, tokens: int, seconds: float
    ) -> None:
        """So many tokens of a priority were prefilled. present: priorities of all that ran or
        waited then."""
        self._prefills.observe(tokens, seconds)
        self._spent(seconds, present, by_others=priority > min(present))

    def decoded(
        self, rows: int, running: Sequence[int], present: Sequence[int], *, seconds: float
    ) -> None:
        """So many of the running requests decoded a token, as `decode_rows` said."""
        self._steps.observe(rows, seconds)
        by_others = self._others_turn or running[0] > min(present)
        self._spent(seconds, present, by_others=by_others)

    def _spent(self, seconds: float, present: Sequence[int], *, by_others: bool) -> None:
        if max(present) > min(present):
            self._share.spent(seconds, by_others=by_others)
        else:
            self._share.end()
