"""Threads that take urgent work first: `ThreadPoolExecutor` takes it in order of arrival."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from typing import Generic, TypeVar

_T = TypeVar("_T")


class PriorityPool(Generic[_T]):
    """Runs calls in `threads` threads, those of smaller priorities first, in order within one."""

    def __init__(self, threads: int, *, name: str) -> None:
        self._order = count()
        self._waiting: list[tuple[int, int, Future[_T], Callable[[], _T]]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], _T], *, priority: int) -> Future[_T]:
        """The future of a call, which can be cancelled until a thread has begun it. Raises
        RuntimeError once the pool is closed."""
        future: Future[_T] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the pool is closed")
            heapq.heappush(self._waiting, (priority, next(self._order), future, call))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Cancels what no thread has begun, and ends the threads."""
        with self._changed:
            self._closed = True
            for _, _, future, _ in self._waiting:
                future.cancel()
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                _, _, future, call = heapq.heappop(self._waiting)
            if future.set_running_or_notify_cancel():
                _run(future, call)
            del future, call  # what they hold is not kept until the next call comes


def _run(future: Future[_T], call: Callable[[], _T]) -> None:
    try:
        result = call()
    except BaseException as error:  # as an executor does: the future's to raise
        future.set_exception(error)
    else:
        future.set_result(result)
