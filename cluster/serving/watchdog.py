"""A small process of its own that kills its parent, a replica, once that one has gone silent.

A stopped or deadlocked process cannot end itself. The watchdog is fed through a pipe, ends when its
parent does, and imports the standard library alone: it runs as `python -I -S watchdog.py PID`.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from typing import Final

_TICK_SECONDS: Final = 1.0
# Beats closer together than this share of the allowed silence are not sent.
_BEAT_SHARE: Final = 0.01


class Watchdog:
    """Watches the process that makes it. One thread beats."""

    def __init__(self) -> None:
        self._beaten = float("-inf")
        self._start()

    def beat(self, allowed_seconds: float) -> None:
        """Says that this process works, and will beat again within so many seconds. Never waits;
        a watchdog that was itself killed is replaced."""
        now = time.monotonic()
        if now - self._beaten < min(_TICK_SECONDS, _BEAT_SHARE * allowed_seconds):
            return
        self._beaten = now
        try:
            os.write(self._pipe.fileno(), f"{allowed_seconds:.3f}\n".encode())
        except BlockingIOError:
            pass  # it has not read for thousands of beats: more would tell it nothing
        except BrokenPipeError:
            self.close()
            self._start()

    def close(self) -> None:
        """Ends the watchdog."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        # In a session of its own, so that no signal to the parent's group reaches it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)


def _watch(parent: int) -> None:
    """Reads the allowed silence, in seconds a line, from stdin. Silence is counted in ticks: after
    a suspended machine or container wakes up, its parent has as long as before."""
    allowed, silent = float("inf"), 0.0
    while os.getppid() == parent:
        tick = min(_TICK_SECONDS, allowed / 10)
        ready, _, _ = select.select([0], [], [], tick)
        if ready:
            beats = os.read(0, 1 << 16).split()
            if not beats:
                return  # the parent has closed the pipe, or is gone
            allowed, silent = float(beats[-1]), 0.0
        else:
            silent += tick
        if silent > allowed:
            print(f"replica {parent} silent for {silent:.0f} s: killed", file=sys.stderr)
            os.kill(parent, signal.SIGKILL)
            return


if __name__ == "__main__":
    _watch(int(sys.argv[1]))
