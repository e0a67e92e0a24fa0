"""A job's lease of a fleet: taken before the fleet is looked for, renewed by a thread, and ended
with the job. The janitor removes a fleet whose last lease has ended.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import ray
import structlog
from ray.exceptions import GetTimeoutError, RayError

from cluster.errors import FleetUnavailable
from cluster.serving.janitor import get_janitor

logger = structlog.get_logger(__name__)

_BEAT_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.2
_ANSWER_SECONDS: Final = 10.0
_REMOVAL_SECONDS: Final = 75.0


class FleetLease:
    """Context manager: holds the lease. The fleet stays while any job holds one."""

    def __init__(self, fleet: str, *, patience_seconds: float, release: bool = True) -> None:
        """patience_seconds: how long to ask for the lease. release: False where the cluster ends
        with the job, and the fleet with it."""
        self._fleet = fleet
        self._patience = patience_seconds
        self._release = release
        self._holder = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._on_beat: Callable[[], None] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="fleet-lease", daemon=True)

    def __enter__(self) -> FleetLease:
        """Waits while the fleet is being removed. Raises FleetUnavailable where the janitor does
        not grant the lease in time."""
        deadline = time.monotonic() + self._patience
        reason = "the fleet is being removed"
        while True:
            try:
                if self._ask("hold", self._fleet, self._holder):
                    break
            except (RayError, GetTimeoutError) as error:
                reason = f"{type(error).__name__}: {error}"
            if time.monotonic() > deadline:
                raise FleetUnavailable(
                    f"no lease of {self._fleet} in {self._patience:.0f} s: {reason}"
                )
            time.sleep(_POLL_SECONDS)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(_REMOVAL_SECONDS)
        if not self._release:
            return
        try:
            self._ask("release", self._fleet, self._holder, seconds=_REMOVAL_SECONDS)
        except Exception as unreachable:  # of Ray in any state, behind the last commit of a run
            # The lease ends by itself when it is not renewed.
            logger.warning("janitor_unreachable", error=type(unreachable).__name__)

    def claim_deployment(self) -> bool:
        """Whether this job, and no other, may deploy until it calls `deployed`. Raises RayError or
        GetTimeoutError where the janitor does not answer."""
        return bool(self._ask("claim_deployment", self._holder))

    def deployed(self) -> None:
        """This job has deployed, or failed to. Raises as `claim_deployment` does."""
        self._ask("deployed", self._holder)

    def after_each_beat(self, call: Callable[[], None]) -> None:
        """From now on, calls this in the lease's thread whenever the lease was renewed."""
        self._on_beat = call

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            try:
                if self._ask("hold", self._fleet, self._holder) and self._on_beat is not None:
                    self._on_beat()
            except Exception as error:  # of Ray or Serve in any state: the next beat tries again
                logger.warning("beat_failed", fleet=self._fleet, error=type(error).__name__)

    def _ask(self, method: str, *arguments: Any, seconds: float = _ANSWER_SECONDS) -> Any:
        # Looked up each time: a janitor that was killed is created anew.
        return ray.get(getattr(get_janitor(), method).remote(*arguments), timeout=seconds)
