"""Patience: how long the trouble of a store may last before it is an error.

Guarantees: trouble that lasts shorter than the patience costs time and nothing else; machines that
failed together do not come back together (full jitter); an outage that lasts is logged once when
it is noticed and once when it has passed, however many calls wait for it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import structlog

from cluster.events import OnEvent, RunEvent

logger = structlog.get_logger(__name__)

IN_FLIGHT_S = 600.0
"""Patience of work in flight, in seconds: less than this is lost by waiting, more by starting the
run again."""
FIRST_CONTACT_S = 30.0
"""Patience where a command asks a store for the first time, in seconds: the trouble is more likely
a misspelt endpoint, and somebody is waiting at the terminal."""
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 20.0
# Below this an outage is a blip, which nobody needs to read about.
_NOTICED_S = 5.0

_T = TypeVar("_T")


class Clock:
    """Time, which tests replace."""

    def now(self) -> float:
        """Seconds since some moment; never set back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Returns after `seconds`."""
        time.sleep(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """For how long a call is made again. Picklable; it travels with its store."""

    seconds: float = IN_FLIGHT_S
    """An attempt that begins this long after the first one is the last; 0 for a single attempt."""
    clock: Clock = field(default_factory=Clock)
    """Where the time comes from."""

    def retry(
        self, address: str, attempt: Callable[[], _T], passing: Callable[[Exception], str | None]
    ) -> _T:
        """The result of `attempt`, made again while its error may pass. Raises the last error.

        address: what is not answering, for the log. passing: the name of an error that may pass,
        None for one that stays.
        """
        first, waits, outage = self.clock.now(), 0, None
        try:
            while True:
                began = self.clock.now()
                try:
                    result = attempt()
                except Exception as error:
                    reason = passing(error)
                    if reason is None or began - first >= self.seconds:
                        raise
                    outage = outage or Outage.join(address, first)
                    outage.notice(reason, self.clock.now(), self.seconds)
                else:
                    if outage is not None:
                        outage.answered = True
                    return result
                longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(waits, 10))
                left = max(0.0, first + self.seconds - self.clock.now())
                # The last attempt begins when the patience ends, not before.
                self.clock.sleep(min(random.uniform(0, longest), left))
                waits += 1
        finally:
            if outage is not None:
                outage.leave(self.clock.now())


@contextmanager
def hear_outages(on_event: OnEvent) -> Iterator[None]:
    """Within it `on_event` hears of each outage in this process that ends, or that was waited for
    in vain, and how many seconds it lasted. Blips are not told."""
    _listeners.append(on_event)
    try:
        yield
    finally:
        _listeners.remove(on_event)


_listeners: list[OnEvent] = []


class Outage:
    """One address that does not answer: from the first failure until no call waits any more."""

    _lock: ClassVar = threading.Lock()
    _current: ClassVar[dict[str, Outage]] = {}

    def __init__(self, address: str, since: float) -> None:
        self.answered = False
        self._address = address
        self._since = since
        self._waiting = 0
        self._noticed = False

    @classmethod
    def join(cls, address: str, since: float) -> Outage:
        """The outage that is going on there, or a new one; the caller waits for it."""
        with cls._lock:
            outage = cls._current.setdefault(address, cls(address, since))
            outage._waiting += 1
            return outage

    def notice(self, reason: str, now: float, patience: float) -> None:
        """Logs the outage, once, as soon as it is more than a blip."""
        with self._lock:
            if self._noticed or now - self._since < _NOTICED_S:
                return
            self._noticed = True
        logger.warning(
            "store_not_answering", uri=self._address, reason=reason, patience_s=round(patience)
        )

    def leave(self, now: float) -> None:
        """The caller waits no more; the last one logs how long it was, if the store answered."""
        with self._lock:
            self._waiting -= 1
            if self._waiting:
                return
            del self._current[self._address]
        if not self._noticed:
            return
        seconds = now - self._since
        if self.answered:
            logger.warning("store_answers_again", uri=self._address, seconds=round(seconds, 1))
        for on_event in list(_listeners):
            on_event(RunEvent.STORE_WAITED, round(seconds))
