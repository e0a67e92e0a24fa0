"""How replicas fared during an attempt, from their counters before and after: telemetry, which may
be missing and fails nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from cluster.events import RunEvent
from cluster.serving.fleet import Fleet, FleetStats

logger = structlog.get_logger(__name__)


def fleet_stats(fleet: Fleet) -> FleetStats | None:
    """None where no replica answers: a figure about the run must not fail it."""
    try:
        return fleet.stats()
    except Exception as error:  # of Ray, of Serve or of a replica that has just died
        logger.warning("stats_unavailable", app=fleet.app, error=type(error).__name__)
        return None


def busy_share(before: FleetStats | None, after: FleetStats | None) -> float | None:
    """Mean over the seconds of all replicas, those that joined included; None if a replica did not
    answer or was replaced: its counters started from zero."""
    if before is None or after is None:
        return None
    if not {replica.pid for replica in before.replicas} <= {r.pid for r in after.replicas}:
        return None
    seconds = after.uptime_seconds - before.uptime_seconds
    return (after.busy_seconds - before.busy_seconds) / seconds if seconds > 0 else None


def with_deaths(
    events: Mapping[str, int], before: FleetStats | None, after: FleetStats | None
) -> Mapping[str, int]:
    """Callers hear of a death only if it took a call with it: a replica that was replaced between
    two calls counts too. One that Serve took away, leaving fewer, did not die."""
    if before is None or after is None or len(after.replicas) < len(before.replicas):
        return events
    replaced = len({r.pid for r in before.replicas} - {r.pid for r in after.replicas})
    died = max(events.get(RunEvent.REPLICA_DIED, 0), replaced)
    return {**events, RunEvent.REPLICA_DIED: died} if died else events
