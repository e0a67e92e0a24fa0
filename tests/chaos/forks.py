"""One process that has imported everything and forks the others: importing costs each driver some
twelve seconds of a core otherwise, most of a run.

    python -m tests.chaos.forks

reads an order per line, `{"module": …, "argument": …, "log": …, "environment": {…}}`, calls
`module.main([argument])` in a fork, and writes `["started", pid]` and `["ended", pid, code]` lines.
It ends, and its forks with it, at the end of its input.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

_START_SECONDS: Final = 240.0


class Forks:
    """Context manager: the process above, as its owner sees it."""

    def __enter__(self) -> Forks:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.forks"],
            stdin=pipe,
            stdout=pipe,
            bufsize=0,
            start_new_session=True,  # a signal to our group is ours to answer, and ends these last
        )
        self._codes: dict[int, int] = {}
        self._started: list[int] = []
        self._partial = b""
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def start(
        self, module: str, argument: str, *, log: Path, environment: Mapping[str, str]
    ) -> int:
        """The process id of a new fork."""
        assert self._process.stdin is not None
        order = {"module": module, "argument": argument, "log": str(log)}
        line = json.dumps({**order, "environment": dict(environment)})
        self._process.stdin.write(line.encode() + b"\n")
        deadline = time.monotonic() + _START_SECONDS
        while not self._started:
            self._read(max(0.0, deadline - time.monotonic()))
            assert time.monotonic() < deadline, "the process that forks does not answer"
        return self._started.pop(0)

    def code(self, pid: int) -> int | None:
        """The exit code of a fork, negative for a signal; None while it runs."""
        self._read(0.0)
        return self._codes.get(pid)

    def wait(self, pid: int, seconds: float) -> int | None:
        """The exit code of a fork; None if it still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        while self.code(pid) is None and time.monotonic() < deadline:
            self._read(0.2)
        return self._codes.get(pid)

    def _read(self, seconds: float) -> None:
        assert self._process.stdout is not None
        while select.select([self._process.stdout], [], [], seconds)[0]:
            data = self._process.stdout.read(2**16)
            assert data, "the process that forks has ended"
            *lines, self._partial = (self._partial + data).split(b"\n")
            for event, pid, *code in map(json.loads, lines):
                if event == "started":
                    self._codes.pop(pid, None)  # of an earlier process with this number
                    self._started.append(pid)
                else:
                    self._codes[pid] = code[0]
            seconds = 0.0


def main() -> int:
    """Forks until its input ends."""
    for module in ("tests.chaos.driver", "tests.chaos.deploy", "torch", "ray.data", "ray.serve"):
        importlib.import_module(module)
    running: set[int] = set()

    def reap(number: int = 0, frame: FrameType | None = None) -> None:
        while running:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            running.discard(pid)
            _write(["ended", pid, os.waitstatus_to_exitcode(status)])

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        # A child that ends at once must not be reaped before it is known.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            return _become(json.loads(line))
        running.add(pid)
        _write(["started", pid])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    return 0


def _write(message: list[Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _become(order: dict[str, Any]) -> int:
    """Turns this fork into the process that was asked for."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(order["environment"])
    code: int = importlib.import_module(order["module"]).main([order["argument"]])
    return code


if __name__ == "__main__":
    sys.exit(main())
