"""Names calls that do not come back: a network drive whose server is gone holds whoever asks for as
long, without an error that could be waited out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from cluster.store.patience import Outage

HELD_S: Final = 30.0
"""A large file on a busy disk takes seconds."""
LISTING_HELD_S: Final = 600.0
"""A hundred thousand files of a network drive take a minute."""
_LOOK_EVERY_S: Final = 5.0


@dataclass(slots=True, kw_only=True, eq=False)
class _Call:
    address: str
    since: float
    patience: float
    held_s: float
    outage: Outage | None = None


_lock: Final = threading.Lock()
_calls: Final = set[_Call]()
_watcher: threading.Thread | None = None


@contextmanager
def watched(address: str, patience: float, *, held_s: float = HELD_S) -> Iterator[None]:
    """Within it a call goes to `address`. One that takes longer than `held_s` is held: it is logged
    and told as an outage is, from when it was made until it comes back. patience: see
    `Outage.notice`."""
    call = _Call(address=address, since=time.monotonic(), patience=patience, held_s=held_s)
    with _lock:
        _calls.add(call)
        _start_watcher()
    answered = False
    try:
        yield
        answered = True
    finally:
        with _lock:
            _calls.remove(call)
        if call.outage is not None:
            call.outage.answered = call.outage.answered or answered
            call.outage.leave(time.monotonic())


def look(now: float) -> None:
    """Notices the calls that are held by now."""
    with _lock:
        for call in _calls:
            if call.outage is None and now - call.since >= call.held_s:
                call.outage = Outage.join(call.address, call.since)
                call.outage.notice("held", now, call.patience)


def _start_watcher() -> None:
    global _watcher
    if _watcher is None or not _watcher.is_alive():  # a forked process has none
        _watcher = threading.Thread(target=_watch, name="held-calls", daemon=True)
        _watcher.start()


def _watch() -> None:
    while True:
        time.sleep(_LOOK_EVERY_S)
        look(time.monotonic())
