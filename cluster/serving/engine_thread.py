"""Runs an engine in a thread of its own and delivers its updates to event loops."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeAlias

from cluster.serving.deadline import Deadline
from cluster.serving.watchdog import Watchdog
from sppruner.engine.interface import Engine, Request, Result, Update

_Command: TypeAlias = Callable[[Engine], None] | None
# An idle engine's thread beats this often.
_IDLE_SECONDS: Final = 1.0


@dataclass(slots=True, eq=False)
class _Subscription:
    """A request and the queue that its updates go to. ticket: set once it is submitted."""

    request: Request
    loop: asyncio.AbstractEventLoop
    updates: asyncio.Queue[Update] = field(default_factory=asyncio.Queue)
    ticket: int | None = None


class EngineThread:
    """Builds an engine in the thread that runs it (CUDA contexts and torch threads belong to a
    thread) and steps it while there are requests.

    on_fault: called in the thread with what the engine raised, after which it answers nothing.
    watchdog: hears a beat before each step and at each heartbeat in one, and while there is none
    to do; None for no watch.
    deadline: for one step. Raises what `build` raises.
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        on_fault: Callable[[Exception], None],
        *,
        watchdog: Watchdog | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self._on_fault = on_fault
        self._watchdog = watchdog
        self._deadline = deadline or Deadline(first=600.0, least=120.0)
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._subscriptions: dict[int, _Subscription] = {}  # by ticket; used in the thread alone
        self._waiting: Counter[int] = Counter()  # by priority; used in the loop alone
        built: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(build, built), name="engine", daemon=True
        )
        self._thread.start()
        self.engine = built.result()

    @property
    def alive(self) -> bool:
        """Whether the engine still runs."""
        return self._thread.is_alive()

    def waiting(self, priority: int) -> int:
        """Requests of a priority without a result."""
        return self._waiting[priority]

    async def answer(self, request: Request) -> Result:
        """The result of a request. Cancelling this call cancels the request."""
        async with aclosing(self.updates(request)) as updates:
            async for update in updates:
                if update.result is not None:
                    return update.result
        raise AssertionError("updates end with a result")

    async def updates(self, request: Request) -> AsyncGenerator[Update]:
        """The updates of a request, the result last. Closing the generator early cancels the
        request."""
        subscription = _Subscription(request, asyncio.get_running_loop())
        self._waiting[request.priority] += 1
        self._commands.put(partial(self._submit, subscription))
        ended = False
        try:
            while not ended:
                update = await subscription.updates.get()
                ended = update.result is not None
                yield update
        finally:
            self._waiting[request.priority] -= 1
            if not ended:
                self._commands.put(partial(self._cancel, subscription))

    async def settled(self, command: Callable[[Engine], None] = lambda engine: None) -> None:
        """Returns once the engine is between two steps, has dropped what was cancelled, and carried
        out `command`."""
        loop = asyncio.get_running_loop()
        reached = asyncio.Event()

        def run(engine: Engine) -> None:
            command(engine)
            _notify(loop, reached.set)

        self._commands.put(run)
        await reached.wait()

    def close(self) -> None:
        """Ends the thread after its present step; requests in flight are dropped."""
        self._commands.put(None)
        self._thread.join()
        if self._watchdog is not None:
            self._watchdog.close()

    def _run(self, build: Callable[[], Engine], built: Future[Engine]) -> None:
        try:
            engine = build()
        except Exception as error:
            built.set_exception(error)
            return
        engine.heartbeat = self._beat
        built.set_result(engine)
        try:
            while self._run_commands(engine):
                started = time.monotonic()
                self._beat()
                engine.step()
                self._deliver(engine.poll())
                self._deadline.observe(time.monotonic() - started)
        except Exception as error:  # Requests have their own errors: this one is the engine's.
            self._on_fault(error)
        finally:
            engine.close()

    def _run_commands(self, engine: Engine) -> bool:
        """Runs pending commands, and waits for one while the engine is idle; False to end."""
        while not engine.in_flight or not self._commands.empty():
            self._beat()
            try:
                command = self._commands.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                continue
            if command is None:
                return False
            command(engine)
        return True

    def _beat(self) -> None:
        if self._watchdog is not None:
            self._watchdog.beat(self._deadline.seconds)

    def _submit(self, subscription: _Subscription, engine: Engine) -> None:
        subscription.ticket = engine.submit(subscription.request)
        self._subscriptions[subscription.ticket] = subscription

    def _cancel(self, subscription: _Subscription, engine: Engine) -> None:
        ticket = subscription.ticket
        if ticket is not None and self._subscriptions.pop(ticket, None) is not None:
            engine.cancel(ticket)

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            # Cancelled requests have no subscription; an event loop may have ended.
            subscription = self._subscriptions.get(update.ticket)
            if update.result is not None:
                self._subscriptions.pop(update.ticket, None)
            if subscription is not None:
                _notify(subscription.loop, partial(subscription.updates.put_nowait, update))


def _notify(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Runs a call in a loop of another thread, unless that loop has ended."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)
