"""SIGTERM as an exception: what a process holds is given back before it ends.

Ray answers SIGTERM in ways of its own: its handler ends a process that starts it with code 15, and
once it has ended, its core has put the system's default in the place of Python's handler. Ray is
started within `handler_kept`, therefore, and ended through `call_heard`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, Final, TypeVar

EXIT_TERMINATED: Final = 143
"""A shell's status for a command that SIGTERM ended."""

# For as long the system's default may be in the handler's place.
_SET_AGAIN_SECONDS: Final = 0.005

_T = TypeVar("_T")

_told = False


class Terminated(KeyboardInterrupt):
    """The process was told to end. Whatever handles Ctrl-C handles it."""


def raise_on_sigterm() -> None:
    """From now on SIGTERM raises Terminated in the main thread, once: a second one must not break
    off what the first one began. Does nothing in another thread; children that this process forks
    end at SIGTERM as usual."""
    global _told
    if _in_main_thread():
        _told = False
        signal.signal(signal.SIGTERM, partial(_raise, os.getpid()))


def was_terminated() -> bool:
    """Whether SIGTERM came since `raise_on_sigterm`. Terminated alone does not tell: Ray raises a
    plain KeyboardInterrupt in its place where it waits, and another error may take its place."""
    return _told


def end_on_sigterm(line: str) -> None:
    """From now on, when there is nothing left to give back, SIGTERM prints the line and ends the
    process. Does nothing after a first SIGTERM, nor in another thread."""
    if _in_main_thread() and not _told:
        signal.signal(signal.SIGTERM, partial(_end, os.getpid(), line))


@contextmanager
def handler_kept() -> Iterator[None]:
    """What runs within may set a handler that ends the process by SystemExit, as `ray.init` does: a
    SIGTERM meanwhile, and all afterwards, are answered by the handler that was there before. Where
    there was none, it is that of `raise_on_sigterm`."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        raise_on_sigterm()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as ended:
        _set(before)
        if ended.code == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        _set(before)


def call_heard(work: Callable[[], _T]) -> _T:
    """The result of `work`, which may set the system's default below Python, as `ray.shutdown`
    does: it is called in another thread, so that SIGTERM is heard meanwhile. What its handler
    raises is raised when the work is done."""
    if not _in_main_thread():
        return work()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        try:
            _wait(done)
        finally:
            _wait(done)
    return done.result()


def _wait(done: Future[_T]) -> None:
    while not done.done():
        _set(signal.getsignal(signal.SIGTERM))
        wait([done], timeout=_SET_AGAIN_SECONDS)
    _set(signal.getsignal(signal.SIGTERM))


def _set(handler: Any) -> None:
    if handler is not None and _in_main_thread():  # None: one that Python does not know
        signal.signal(signal.SIGTERM, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise(owner: int, number: int, frame: FrameType | None) -> None:
    global _told
    _end_if_forked(owner)
    if not _told:
        _told = True
        raise Terminated


def _end(owner: int, line: str, number: int, frame: FrameType | None) -> None:
    _end_if_forked(owner)
    os.write(2, f"{line}\n".encode(errors="backslashreplace"))  # print may be at work below
    os._exit(EXIT_TERMINATED)


def _end_if_forked(owner: int) -> None:
    if os.getpid() != owner:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
