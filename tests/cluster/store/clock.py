"""A clock that only sleeping moves."""

from __future__ import annotations

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
