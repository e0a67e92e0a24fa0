"""SIGTERM as an exception: what a process holds is given back before it ends."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from types import FrameType
from typing import Final

EXIT_TERMINATED: Final = 143
"""A shell's status for a command that SIGTERM ended."""


class Terminated(KeyboardInterrupt):
    """The process was told to end. Whatever handles Ctrl-C handles it."""


def raise_on_sigterm() -> None:
    """From now on SIGTERM raises Terminated in the main thread, once: a second one must not break
    off what the first one began. Does nothing in another thread; children that this process forks
    end at SIGTERM as usual."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, partial(_raise, os.getpid()))


def _raise(owner: int, number: int, frame: FrameType | None) -> None:
    if os.getpid() != owner:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
