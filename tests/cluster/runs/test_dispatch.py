"""Dispatch: retries, bisection of calls that kill replicas, and bounded rows in flight."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from cluster.errors import Busy
from cluster.protocol import LabelRequest, Priority
from cluster.runs.admission import Admission
from cluster.runs.dispatch import AttemptedRow, Dispatcher
from sppruner.engine.interface import Result


class OneReplica:
    """A replica whose death fails all calls in flight, as the death of a process does.

    poison: ids of rows that kill it. refusals: calls that are refused as busy at first.
    """

    def __init__(self, *, poison: frozenset[str] = frozenset(), refusals: int = 0) -> None:
        self.poison = poison
        self.refusals = refusals
        self.in_flight = 0
        self.most_in_flight = 0
        self.calls = 0
        self._death = asyncio.Event()

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        assert priority is Priority.BATCH
        if self.refusals:
            self.refusals -= 1
            raise Busy("full") if self.refusals % 2 else BackPressureError(9, 8)
        self.calls += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        death = self._death
        try:
            for _ in range(3):
                await asyncio.sleep(0)
                if any(request.id in self.poison for request in requests):
                    death.set()
                    self._death = asyncio.Event()
                if death.is_set():
                    raise ActorDiedError
            return [Result(id=one.id, text=one.id) for one in requests]
        finally:
            self.in_flight -= 1


def dispatch(
    replica: OneReplica, chunks: Sequence[Sequence[str]], *, rows: int = 3, max_attempts: int = 2
) -> list[list[AttemptedRow]]:
    async def body() -> list[list[AttemptedRow]]:
        dispatcher = Dispatcher(
            replica, admission=Admission(rows=rows), max_attempts=max_attempts, pause_seconds=0.0001
        )
        calls = [[LabelRequest(id=name, prompt="p") for name in chunk] for chunk in chunks]
        return list(await asyncio.gather(*(dispatcher.dispatch(chunk) for chunk in calls)))

    return asyncio.run(asyncio.wait_for(body(), 30))


def test_rows_in_flight_never_exceed_the_admission_bound() -> None:
    replica = OneReplica()
    dispatch(replica, [[str(n)] for n in range(20)], rows=3)
    assert replica.most_in_flight == 3


def test_busy_and_backpressure_are_retried_without_counting_as_attempts() -> None:
    ((row,),) = dispatch(OneReplica(refusals=7), [["a"]], max_attempts=1)
    assert (row.result.text, row.attempts) == ("a", 1)


def test_only_the_row_that_kills_replicas_becomes_a_poison_row() -> None:
    names = [f"r{n}" for n in range(8)]
    (rows,) = dispatch(OneReplica(poison=frozenset({"r5"})), [names])
    assert [row.result.error_code for row in rows] == [
        "poison_row" if name == "r5" else None for name in names
    ]
    assert rows[5].attempts > 2


def test_an_unexpected_error_propagates() -> None:
    class Broken(OneReplica):
        async def label(
            self, requests: Sequence[LabelRequest], *, priority: Priority
        ) -> list[Result]:
            raise TypeError("a bug")

    with pytest.raises(TypeError):
        dispatch(Broken(), [["a"]])


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    poison=st.sets(st.integers(0, 35), max_size=3),
    rows=st.integers(1, 10),
    max_attempts=st.integers(1, 3),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_under_any_replica_deaths_each_row_has_one_result_and_only_poison_rows_fail(
    sizes: list[int], poison: set[int], rows: int, max_attempts: int
) -> None:
    """Rows of the same call, and calls on the same replica, are never reported as poison."""
    numbers = iter(range(sum(sizes)))
    chunks = [[str(next(numbers)) for _ in range(size)] for size in sizes]
    killers = frozenset(map(str, poison))

    attempted = dispatch(OneReplica(poison=killers), chunks, rows=rows, max_attempts=max_attempts)

    results = [row.result for chunk in attempted for row in chunk]
    assert [result.id for result in results] == [name for chunk in chunks for name in chunk]
    reported = Counter(result.id for result in results if result.error_code == "poison_row")
    assert reported == Counter(name for chunk in chunks for name in chunk if name in killers)
