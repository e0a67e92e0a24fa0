"""A clock that only sleeping moves."""

from __future__ import annotations

from collections.abc import Callable

from cluster.store.patience import Clock


class FakeClock(Clock):
    """Starts at 0 s."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.time += seconds


class EventfulClock(FakeClock):
    """Something happens while somebody sleeps until `at`, in seconds, or later."""

    def __init__(self, at: float, act: Callable[[], object]) -> None:
        super().__init__()
        self._at, self._act = at, act

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        if self.time >= self._at:
            self._at = float("inf")
            self._act()
