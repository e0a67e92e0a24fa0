"""The command's processes: one that runs, and others that were stopped or started beside it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.ground import Ground
from tests.chaos.judge import Attempt
from tests.chaos.places import Place
from tests.chaos.processes import send
from tests.chaos.schedule import Schedule


@dataclass(slots=True, kw_only=True, eq=False)
class _Driver:
    pid: int
    log: Path
    excused: bool
    signals: tuple[str, ...] = ()
    was_ready: bool = False


class Drivers:
    """Starts and ends the command's processes. What they print goes to files in `folder`."""

    def __init__(self, schedule: Schedule, ground: Ground, place: Place, folder: Path) -> None:
        self._ground = ground
        self._folder = folder
        tag = {} if schedule.attached else {"tag": f"seed-{schedule.seed}"}
        self._settings = {
            "task": schedule.corpus.task,
            "input": place.input,
            "output": place.output,
            "replicas": schedule.replicas,
            "unit_rows": schedule.unit_rows,
            "engine": {**ground.engine_options, **tag},
        }
        self._started = 0
        self._trouble = 0
        self._all: list[_Driver] = []
        self._current: _Driver | None = None
        self.attempts: list[Attempt] = []

    @property
    def running(self) -> bool:
        """Whether the current driver runs."""
        return self._current is not None

    @property
    def any_left(self) -> bool:
        """Whether any driver is left, stopped ones included."""
        return bool(self._all)

    def start(self, *, beside: bool = False) -> None:
        """Starts the command. beside: while the current one goes on."""
        self._started += 1
        log = self._folder / f"driver-{self._started}.log"
        pid = self._ground.forks.start(
            "tests.chaos.driver",
            json.dumps(self._settings),
            log=log,
            environment={"RAY_ADDRESS": self._ground.address},
        )
        driver = _Driver(pid=pid, log=log, excused=self._trouble > 0)
        self._all.append(driver)
        if not beside:
            self._current = driver

    def begin_trouble(self) -> None:
        """From now on a run may fail."""
        self._trouble += 1
        for driver in self._all:
            driver.excused = True

    def end_trouble(self) -> None:
        """The end of what `begin_trouble` began."""
        self._trouble -= 1

    def send_current(self, name: str) -> bool:
        """Sends KILL or TERM to the current driver; False where none runs."""
        if self._current is None:
            return False
        driver = self._current
        ready = driver.log.exists() and driver.log.stat().st_size > 0
        if not send(driver.pid, signal.Signals[f"SIG{name}"]):
            return False
        driver.signals, driver.was_ready = (*driver.signals, name), ready
        return True

    def stop_current(self, *, start_another: bool) -> int | None:
        """Stops the current driver, and says which process that is; None where none runs."""
        stopped = self._current
        if stopped is None or not send(stopped.pid, signal.SIGSTOP):
            return None
        if start_another:
            self.start()
        return stopped.pid

    def poll(self, commits: Callable[[], int]) -> list[Attempt]:
        """The drivers that ended since the last call. commits: asked behind each one's end."""
        attempts = []
        for driver in list(self._all):
            code = self._ground.forks.code(driver.pid)
            if code is None:
                continue
            self._all.remove(driver)
            if driver is self._current:
                self._current = None
            attempts.append(
                Attempt(
                    code=code,
                    signals=driver.signals,
                    excused=driver.excused,
                    commits=commits(),
                    was_ready=driver.was_ready,
                )
            )
        self.attempts += attempts
        return attempts

    def end_all(self) -> None:
        """Kills whatever is left."""
        for driver in self._all:
            send(driver.pid, signal.SIGKILL)
            self._ground.forks.wait(driver.pid, 30)
        self._all.clear()
        self._current = None
