"""A run in the controller's view, as its driver keeps it there: registered from what the store
holds, registered again if the controller was restarted, and ended with how it ended.
"""

from __future__ import annotations

from types import TracebackType

import ray
import structlog
from ray.exceptions import GetTimeoutError, RayError

from cluster.accounting.ledger import RunLedger, read_ledgers
from cluster.config import RunConfig
from cluster.controller import RunProgress, RunState, get_controller
from cluster.errors import ErrorShareExceeded, RunError
from cluster.runs.planning import Plan, done_units
from cluster.store import Store

logger = structlog.get_logger(__name__)

_POLL_TIMEOUT_SECONDS = 5.0


def run_error(error: BaseException | None) -> RunError | None:
    """The RunError at the root of what Ray wrapped around it, if there is one."""
    while error is not None:
        if isinstance(error, RunError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


class RunTracker:
    """Context manager around the work of one attempt; `progress` may be asked from any thread."""

    def __init__(self, config: RunConfig, plan: Plan, store: Store) -> None:
        self._config = config
        self._plan = plan
        self._store = store
        self._controller = get_controller()

    def __enter__(self) -> RunTracker:
        self._register()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        state: RunState = "completed"
        if isinstance(error, KeyboardInterrupt) or isinstance(run_error(error), ErrorShareExceeded):
            state = "stopped"
        elif error is not None:
            state = "failed"
        try:
            ray.get(
                self._controller.finish.remote(self._plan.run_id, state),
                timeout=_POLL_TIMEOUT_SECONDS,
            )
        except (RayError, GetTimeoutError) as unreachable:
            logger.warning("controller_unreachable", error=type(unreachable).__name__)

    def progress(self) -> RunProgress | None:
        """How far the run is; None while the controller cannot be asked."""
        try:
            known: RunProgress | None = ray.get(
                self._controller.progress.remote(self._plan.run_id), timeout=_POLL_TIMEOUT_SECONDS
            )
            if known is None:
                logger.info("controller_restarted", run_id=self._plan.run_id)
                self._register()
        except (RayError, GetTimeoutError) as error:
            logger.warning("controller_unreachable", error=type(error).__name__)
            return None
        return known

    def _register(self) -> None:
        planned = {unit.unit_id for unit in self._plan.units}
        done = sorted(done_units(self._store) & planned)
        ledger = RunLedger.of(read_ledgers(self._store, done))
        call = self._controller.register.remote(
            self._plan.run_id,
            meta={
                "kind": self._plan.kind,
                "output": self._plan.output_uri,
                "model": self._config.model,
                "spec": self._config.spec.to_dict(),
            },
            units_total=len(self._plan.units),
            rows_total=self._plan.rows,
            units_done=done,
            ledger_so_far=ledger.total,
            max_error_share=self._config.max_error_share,
            error_share_after=self._config.error_share_after,
        )
        ray.get(call, timeout=_POLL_TIMEOUT_SECONDS * 6)
