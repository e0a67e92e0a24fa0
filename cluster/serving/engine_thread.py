"""An engine in a thread of its own, and what it says, for an event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from sppruner.engine.interface import Engine, Request, Result, Update

_Command: TypeAlias = Callable[[Engine], None] | None


@dataclass(slots=True, eq=False)
class _Asked:
    """A request, and where its updates go in the loop that asked. ticket: once it is submitted."""

    request: Request
    loop: asyncio.AbstractEventLoop
    updates: asyncio.Queue[Update] = field(default_factory=asyncio.Queue)
    ticket: int | None = None


class EngineThread:
    """Builds an engine where it will run (CUDA contexts and torch threads belong to a thread) and
    steps it for as long as there are requests.

    on_fault: called, in the thread, with what the engine raised; it answers nothing more then.
    Raises what `build` raises.
    """

    def __init__(self, build: Callable[[], Engine], on_fault: Callable[[Exception], None]) -> None:
        self._on_fault = on_fault
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._asked: dict[int, _Asked] = {}  # by ticket; the thread's alone
        self._waiting: Counter[int] = Counter()  # by priority; the loop's alone
        built: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(build, built), name="engine", daemon=True
        )
        self._thread.start()
        self.engine = built.result()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def waiting(self, priority: int) -> int:
        """Requests of a priority without a result."""
        return self._waiting[priority]

    async def answer(self, request: Request) -> Result:
        """The result of a request. Whoever stops waiting cancels it."""
        async with aclosing(self.updates(request)) as updates:
            async for update in updates:
                if update.result is not None:
                    return update.result
        raise AssertionError("updates end with a result")

    async def updates(self, request: Request) -> AsyncGenerator[Update]:
        """What the engine says of a request, the result last. Who stops listening cancels it."""
        asked = _Asked(request, asyncio.get_running_loop())
        self._waiting[request.priority] += 1
        self._commands.put(partial(self._submit, asked))
        ended = False
        try:
            while not ended:
                update = await asked.updates.get()
                ended = update.result is not None
                yield update
        finally:
            self._waiting[request.priority] -= 1
            if not ended:
                self._commands.put(partial(self._cancel, asked))

    def close(self) -> None:
        """Ends the thread after its present step; what is in flight is dropped."""
        self._commands.put(None)
        self._thread.join()

    def _run(self, build: Callable[[], Engine], built: Future[Engine]) -> None:
        try:
            engine = build()
        except Exception as error:
            built.set_exception(error)
            return
        built.set_result(engine)
        try:
            while self._obey(engine):
                engine.step()
                self._tell(engine.poll())
        except Exception as error:  # Requests have their own errors: this one is the engine's.
            self._on_fault(error)
        finally:
            engine.close()

    def _obey(self, engine: Engine) -> bool:
        """Takes what was commanded, and waits while there is nothing to do; False to end."""
        while not engine.in_flight or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command(engine)
        return True

    def _submit(self, asked: _Asked, engine: Engine) -> None:
        asked.ticket = engine.submit(asked.request)
        self._asked[asked.ticket] = asked

    def _cancel(self, asked: _Asked, engine: Engine) -> None:
        if asked.ticket is not None and self._asked.pop(asked.ticket, None) is not None:
            engine.cancel(asked.ticket)

    def _tell(self, updates: list[Update]) -> None:
        for update in updates:
            # Nobody listens to what was cancelled, or in a loop that has ended.
            asked = self._asked.get(update.ticket)
            if update.result is not None:
                self._asked.pop(update.ticket, None)
            if asked is not None and not asked.loop.is_closed():
                asked.loop.call_soon_threadsafe(asked.updates.put_nowait, update)
