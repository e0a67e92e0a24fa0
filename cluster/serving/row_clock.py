"""How long rows take a replica: at every moment its wall time is shared by all rows that it has.

A row's seconds are the integral of dt / n over its time at the replica, from its image's decoding
to its answer, with n the rows that are there. The seconds of all rows together are then exactly the
time in which the replica had any, whatever ran at once and whatever they waited for. Shares of the
engine's steps, as clocks inside an engine give them, leave out what it waits for: a run that is
bound by the decoding of its images would show a saving that nobody has.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class RowClock:
    """One event loop owns an instance."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """now: seconds by a clock that never goes back."""
        self.now = now
        self._rows = 0
        self._shared = 0.0  # the integral up to `_at`
        self._at = now()

    def start(self) -> RowTimer:
        """A row has come."""
        began = self._advance()
        self._rows += 1
        return RowTimer(self, began)

    def _advance(self) -> float:
        now = self.now()
        if self._rows:
            self._shared += (now - self._at) / self._rows
        self._at = now
        return self._shared

    def _stop(self) -> float:
        shared = self._advance()
        self._rows -= 1
        return shared


class RowTimer:
    """One row's time at a replica."""

    def __init__(self, clock: RowClock, began: float) -> None:
        self._clock = clock
        self._began = began
        self._came = clock.now()
        self._seconds: float | None = None

    @property
    def elapsed(self) -> float:
        """Wall seconds since it came."""
        return self._clock.now() - self._came

    def stop(self) -> float:
        """The row's seconds. It is gone from the first call on; later calls say the same."""
        if self._seconds is None:
            self._seconds = self._clock._stop() - self._began
        return self._seconds
