"""Tracks one attempt in the run controller: registers the run from what its output holds, again if
the controller restarts, and reports how the attempt ended.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import TracebackType

import ray
import structlog

from cluster.accounting.control_plan import ControlPlan
from cluster.accounting.ledger import RunLedger, UnitLedger
from cluster.config import RunConfig
from cluster.controller import RunName, RunProgress, RunState, get_controller
from cluster.errors import ErrorShareExceeded, StoreError
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.unexpected import run_error

logger = structlog.get_logger(__name__)

_POLL_TIMEOUT_SECONDS = 5.0


class RunTracker:
    """Keeps the controller's view of one attempt: registers the run on entry, reports its end on
    exit. `progress` may be called from any thread."""

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        output: RunOutput,
        *,
        again: Collection[str] = (),
        control: ControlPlan | None = None,
    ) -> None:
        """again: committed units that this attempt labels again; they count as not done. control:
        blocks that the run may have."""
        self._control = control
        self._config = config
        self._again = frozenset(again)
        self._name = RunName(manifest.run_id, output.uri)
        self._manifest = manifest
        self._output = output
        self._controller = get_controller()
        self._registered = False
        self._events: Mapping[str, int] = {}

    def __enter__(self) -> RunTracker:
        """Raises StoreError where a committed unit cannot be read, before anything is labelled."""
        committed = self._committed()
        # A run needs no controller: `progress` registers it once there is one.
        try:
            self._register(committed)
        except Exception as error:  # of Ray, in any state: this is telemetry
            logger.warning("controller_unreachable", error=type(error).__name__)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        state: RunState = "failed"
        if error is None:  # else nothing is asked of a store that may be what failed
            state = "completed" if self._is_complete() else "incomplete"
        elif isinstance(error, KeyboardInterrupt) or isinstance(
            run_error(error), ErrorShareExceeded
        ):
            state = "stopped"
        try:
            ended: RunProgress | None = ray.get(
                self._controller.finish.remote(self._name, state, again=bool(self._again)),
                timeout=_POLL_TIMEOUT_SECONDS,
            )
        except Exception as unreachable:  # of Ray in any state, behind the last commit
            logger.warning("controller_unreachable", error=type(unreachable).__name__)
        else:
            self._events = {} if ended is None else ended.events

    @property
    def events(self) -> Mapping[str, int]:
        """What happened in the attempt, by kind, once it ended; empty where the controller was
        unreachable."""
        return self._events

    def progress(self) -> RunProgress | None:
        """The run as of now; None while the controller is unreachable."""
        try:
            known: RunProgress | None = ray.get(
                self._controller.progress.remote(self._name),
                timeout=_POLL_TIMEOUT_SECONDS,
            )
            # What is known of a run that this attempt could not register is of an earlier one.
            if known is None or not self._registered:
                logger.info("controller_restarted", run_id=self._manifest.run_id)
                self._register(self._committed())
        except Exception as error:  # of Ray or the store, in any state: this is telemetry
            logger.warning("controller_unreachable", error=type(error).__name__)
            return None
        return known

    def stop_error(self) -> ErrorShareExceeded | None:
        """Why the controller would have this run stopped; None for no reason, where it is
        unreachable, and for an attempt that nothing stops."""
        if not self._config.is_guarded:
            return None
        try:
            reason: str | None = ray.get(
                self._controller.stop_reason.remote(self._name),
                timeout=_POLL_TIMEOUT_SECONDS,
            )
        except Exception as error:  # of Ray or the store, in any state: this is telemetry
            logger.warning("controller_unreachable", error=type(error).__name__)
            return None
        return None if reason is None else ErrorShareExceeded(reason)

    def _is_complete(self) -> bool:
        """Whether every planned unit is committed; so too where the store does not say."""
        try:
            return self._output.committed_units() >= {u.unit_id for u in self._manifest.units}
        except StoreError as error:
            logger.warning("end_unknown", run_id=self._manifest.run_id, error=str(error))
            return True

    def _committed(self) -> dict[str, UnitLedger]:
        """The committed units and their ledgers."""
        planned = {unit.unit_id for unit in self._manifest.units} - self._again
        done = sorted(self._output.committed_units() & planned)
        return dict(zip(done, self._output.ledgers(done), strict=True))

    def _register(self, committed: Mapping[str, UnitLedger]) -> None:
        control = self._control
        call = self._controller.register.remote(
            self._name,
            meta={
                "kind": self._manifest.kind,
                "output": self._output.uri,
                "model": self._config.model,
                "spec": self._config.spec.to_dict(),
            },
            units_total=len(self._manifest.units),
            rows_total=self._manifest.rows,
            units_done=list(committed),
            ledger_so_far=RunLedger.of(committed.values()).total,
            lost=[unit for unit, led in committed.items() if control and control.loses(unit, led)],
            measured={unit: led.blocks[0] for unit, led in committed.items() if led.blocks},
            max_error_share=self._config.max_error_share,
            error_share_after=self._config.error_share_after,
            again=sorted(self._again),
            control=control,
        )
        ray.get(call, timeout=_POLL_TIMEOUT_SECONDS * 6)
        self._registered = True
