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
    """A replica in which everything in flight dies together, as in a real process."""

    def __init__(self, *, poison: frozenset[str] = frozenset(), refusals: int = 0) -> None:
        self.poison = poison
        self.refusals = refusals
        self.in_flight = 0
        self.most_in_flight = 0
        self.calls = 0
        self._death = asyncio.Event()

    async def label(self, calls: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
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
                if any(call.id in self.poison for call in calls):
                    death.set()
                    self._death = asyncio.Event()
                if death.is_set():
                    raise ActorDiedError
            return [Result(id=call.id, text=call.id) for call in calls]
        finally:
            self.in_flight -= 1


def deliver(
    replica: OneReplica, chunks: Sequence[Sequence[str]], *, rows: int = 3, max_attempts: int = 2
) -> list[list[AttemptedRow]]:
    async def body() -> list[list[AttemptedRow]]:
        delivery = Dispatcher(
            replica, admission=Admission(rows=rows), max_attempts=max_attempts, pause_seconds=0.0001
        )
        calls = [[LabelRequest(id=name, prompt="p") for name in chunk] for chunk in chunks]
        return list(await asyncio.gather(*(delivery.dispatch(chunk) for chunk in calls)))

    return asyncio.run(asyncio.wait_for(body(), 30))


def test_rows_in_flight_never_exceed_the_credits() -> None:
    replica = OneReplica()
    deliver(replica, [[str(n)] for n in range(20)], rows=3)
    assert replica.most_in_flight == 3


def test_busy_and_backpressure_are_asked_again_and_count_as_no_attempt() -> None:
    ((delivered,),) = deliver(OneReplica(refusals=7), [["a"]], max_attempts=1)
    assert (delivered.result.text, delivered.attempts) == ("a", 1)


def test_only_the_row_that_kills_replicas_is_called_poison() -> None:
    rows = [f"r{n}" for n in range(8)]
    (answers,) = deliver(OneReplica(poison=frozenset({"r5"})), [rows])
    assert [d.result.error_code for d in answers] == [
        "poison_row" if name == "r5" else None for name in rows
    ]
    assert answers[5].attempts > 2


def test_an_error_that_is_no_death_ends_the_delivery() -> None:
    class Broken(OneReplica):
        async def label(self, calls: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
            raise TypeError("a bug")

    with pytest.raises(TypeError):
        deliver(Broken(), [["a"]])


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    poison=st.sets(st.integers(0, 35), max_size=3),
    rows=st.integers(1, 10),
    max_attempts=st.integers(1, 3),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_whatever_dies_every_row_is_answered_once_and_only_poison_is_accused(
    sizes: list[int], poison: set[int], rows: int, max_attempts: int
) -> None:
    """Neighbours in the call, and calls that shared the replica with it, are never accused."""
    numbers = iter(range(sum(sizes)))
    chunks = [[str(next(numbers)) for _ in range(size)] for size in sizes]
    bad = frozenset(map(str, poison))

    delivered = deliver(OneReplica(poison=bad), chunks, rows=rows, max_attempts=max_attempts)

    answers = [d.result for chunk in delivered for d in chunk]
    assert [a.id for a in answers] == [name for chunk in chunks for name in chunk]
    accused = Counter(a.id for a in answers if a.error_code == "poison_row")
    assert accused == Counter(name for chunk in chunks for name in chunk if name in bad)
