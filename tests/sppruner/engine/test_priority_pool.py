"""Urgent work is taken first, and a pool behaves as an executor does otherwise."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, wait

import pytest

from sppruner.engine.priority_pool import PriorityPool


def test_smaller_priorities_are_taken_first_and_in_order() -> None:
    pool, go, done = PriorityPool[int](1, name="test"), threading.Event(), list[int]()
    first = pool.submit(lambda: int(go.wait(10)), priority=1)

    def note(number: int) -> int:
        done.append(number)
        return number

    asked = [(1, 0), (0, 1), (1, 2), (-1, 3), (0, 4)]
    futures = [pool.submit(lambda n=n: note(n), priority=p) for p, n in asked]  # type: ignore[misc]
    go.set()
    wait([first, *futures], timeout=10)
    pool.close()
    assert done == [3, 1, 4, 0, 2]
    assert [future.result() for future in futures] == [0, 1, 2, 3, 4]


def test_an_error_is_the_futures_and_the_thread_goes_on() -> None:
    pool = PriorityPool[float](1, name="test")
    failed, other = (pool.submit(lambda n=n: 1 / n, priority=0) for n in (0, 2))  # type: ignore[misc]
    with pytest.raises(ZeroDivisionError):
        failed.result(10)
    assert other.result(10) == 0.5
    pool.close()


def test_what_is_cancelled_or_waits_at_the_end_is_not_run() -> None:
    pool, go = PriorityPool[bool](1, name="test"), threading.Event()
    running = pool.submit(lambda: go.wait(10), priority=0)
    while not running.running():
        pass
    cancelled, waiting = (pool.submit(pytest.fail, priority=0) for _ in range(2))
    assert cancelled.cancel()
    closing = threading.Thread(target=pool.close)
    closing.start()
    while not waiting.cancelled():
        pass
    go.set()
    closing.join(10)
    assert running.result() is True
    with pytest.raises(CancelledError):
        waiting.result(10)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(bool, priority=0)
