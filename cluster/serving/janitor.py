"""The janitor: one named, detached actor that knows who uses the fleets that jobs deployed, and
removes those that nobody uses any more.

It outlives the jobs, so that the fleet of a killed one does not hold its GPUs for ever. It loses
its table when it restarts, and hears of every job again with the job's next beat.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import ray
import structlog
from ray.actor import ActorHandle

from cluster.serving.leases import Leases
from cluster.serving.serve_state import (
    application_names,
    is_job_application,
    remove_application,
)

logger = structlog.get_logger(__name__)

JANITOR_NAME: Final = "fleet-janitor-1"
"""The actor's name. Its number is raised with every change of what is sent to it: the actor
outlives its creator, with that one's code."""
JANITOR_NAMESPACE: Final = "sppruner"
"""The actor's Ray namespace."""
PATIENCE_SECONDS: Final = 60.0
"""A job that is not heard of for so long is taken for dead."""
_PATROL_SECONDS: Final = 5.0
_REMOVAL_SECONDS: Final = 60.0


class Janitor:
    """What the actor does, without its rounds. Every call may be sent again."""

    def __init__(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._leases = Leases(patience_seconds=patience_seconds)

    async def hold(self, fleet: str, holder: str) -> bool:
        """See `Leases.hold`."""
        return self._leases.hold(fleet, holder, time.monotonic())

    async def claim_deployment(self, holder: str) -> bool:
        """See `Leases.claim_deployment`."""
        return self._leases.claim_deployment(holder, time.monotonic())

    async def deployed(self, holder: str) -> None:
        """See `Leases.deployed`."""
        self._leases.deployed(holder)

    async def release(self, fleet: str, holder: str) -> None:
        """Ends a lease, and returns once a fleet whose last lease it was is removed."""
        if self._leases.release(fleet, holder, time.monotonic()):
            await self._remove(fleet, "released")

    async def holders(self, fleet: str) -> list[str]:
        """See `Leases.holders`."""
        return self._leases.holders(fleet)

    async def patrol(self) -> None:
        """Removes the fleets that jobs deployed and that nobody has held for the patience."""
        names = await application_names()
        if names is None:
            return
        ours = [name for name in names if is_job_application(name)]
        overdue = self._leases.overdue(ours, time.monotonic())
        await asyncio.gather(*(self._remove(fleet, "nobody was heard of") for fleet in overdue))

    async def _remove(self, fleet: str, why: str) -> None:
        logger.info("fleet_removed", app=fleet, why=why)
        try:
            if not await remove_application(fleet, timeout_seconds=_REMOVAL_SECONDS):
                logger.warning("fleet_still_there", app=fleet, seconds=_REMOVAL_SECONDS)
        except Exception as error:  # of Ray or Serve: it becomes overdue again
            logger.warning("removal_failed", app=fleet, error=type(error).__name__)
        finally:
            self._leases.removed(fleet)


class PatrollingJanitor(Janitor):
    """The actor: makes its rounds from the start on, also where Ray started it again."""

    async def __init__(self) -> None:  # type: ignore[misc]
        Janitor.__init__(self)
        self._rounds = asyncio.create_task(self._patrol_for_ever())

    async def _patrol_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_PATROL_SECONDS)
            try:
                await self.patrol()
            except Exception as error:  # whatever it is, the next round comes
                logger.warning("patrol_failed", exc_info=error)


def get_janitor() -> ActorHandle[PatrollingJanitor]:
    """The cluster's janitor, created if there is none. It outlives its creator."""
    remote: Any = ray.remote(PatrollingJanitor)
    handle: ActorHandle[PatrollingJanitor] = remote.options(
        name=JANITOR_NAME,
        namespace=JANITOR_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1000,
    ).remote()
    return handle
