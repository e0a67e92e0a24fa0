"""How long a run waits while no replica is up: as long as nodes may come back, not for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cluster.errors import FleetUnavailable
from cluster.events import RunEvent

PATIENCE_SECONDS: Final = 1800.0
"""Long enough for a node to be replaced and the model to be loaded again."""


class ReplicaWait:
    """Hears how many replicas are up, and counts the seconds in which none was."""

    def __init__(
        self,
        report: Callable[[RunEvent, int], None],
        *,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """report: hears of waits, in whole seconds, while they last."""
        self._report = report
        self._patience = patience_seconds
        self._since: float | None = None
        self._reported = 0

    def observe(self, live: int | None, now: float) -> None:
        """live: replicas that are up; None where that is unknown, which begins no wait and ends
        none. now: seconds of a clock that only goes forward. Raises FleetUnavailable once none was
        up for the patience."""
        if live:
            self._since, self._reported = None, 0
            return
        if self._since is None:
            self._since = now if live == 0 else None
            return
        waited = now - self._since
        reportable = int(waited)
        if reportable > self._reported:
            self._report(RunEvent.REPLICAS_WAITED, reportable - self._reported)
            self._reported = reportable
        if waited >= self._patience:
            raise FleetUnavailable(
                f"no replica was up for {waited:.0f} s. Committed units stay: give the cluster "
                "GPUs or CPUs, and the same command again"
            )
