"""Dispatch: exactly one result for each row, in bounded time, whatever replicas do."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Sequence

import pytest
import structlog
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from cluster.errors import Busy, FleetUnstable
from cluster.events import RunEvent
from cluster.protocol import BlockAnswers, LabelRequest, Priority
from cluster.runs.admission import Admission
from cluster.runs.dispatch import AttemptedRow, Dispatcher
from sppruner.engine.interface import Result
from tests.cluster.measured_blocks import even_block
from tests.cluster.runs.simulated_fleet import ACCIDENTS, Schedule, SimulatedFleet
from tests.cluster.runs.virtual_time import run_in_virtual_time

HOUR = 3600.0


@pytest.fixture(autouse=True)
def quiet(own_logs: None) -> None:
    """Simulations report thousands of deaths."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def dispatch(
    fleet: SimulatedFleet,
    chunks: Sequence[Sequence[str]],
    *,
    rows: int = 8,
    max_attempts: int = 3,
    events: Counter[RunEvent] | None = None,
    blocks: Collection[int] = (),
) -> tuple[list[list[AttemptedRow]], float]:
    """Every chunk's rows, and the hours that it took. blocks: chunks that are control blocks."""

    def report(kind: RunEvent, count: int, subject: str | None) -> None:
        if events is not None:
            events[kind] += count

    async def body() -> tuple[list[list[AttemptedRow]], float]:
        dispatcher = Dispatcher(
            fleet, admission=Admission(rows=rows), max_attempts=max_attempts, report=report
        )
        calls = [[LabelRequest(id=name, prompt="p") for name in chunk] for chunk in chunks]
        answered = await asyncio.gather(
            *(
                dispatcher.dispatch_block(call, dense_first=number % 2 == 0, call_rows=3)
                if number in blocks
                else dispatcher.dispatch(call)
                for number, call in enumerate(calls)
            )
        )
        return list(answered), asyncio.get_running_loop().time() / HOUR

    random.seed(0)
    return run_in_virtual_time(body())


def named(sizes: Sequence[int]) -> list[list[str]]:
    numbers = iter(range(sum(sizes)))
    return [[f"r{next(numbers)}" for _ in range(size)] for size in sizes]


def codes(attempted: Sequence[Sequence[AttemptedRow]]) -> dict[str, str | None]:
    return {row.result.id: row.result.error_code for chunk in attempted for row in chunk}


@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=8),
    killers=st.sets(st.integers(0, 63), max_size=4),
    hangers=st.sets(st.integers(0, 63), max_size=2),
    failing=st.sets(st.integers(0, 63), max_size=3),
    accidents=st.lists(st.sampled_from(ACCIDENTS), max_size=8),
    refusals=st.integers(0, 30),
    blocks=st.sets(st.integers(0, 7), max_size=3),
    replicas=st.integers(1, 4),
    rows=st.integers(1, 40),
    max_attempts=st.integers(1, 4),
    seed=st.integers(0, 10_000),
)
@hypothesis_settings(max_examples=80, deadline=None)
def test_under_every_schedule_each_row_has_one_result_and_only_guilty_rows_fail(
    sizes: list[int],
    killers: set[int],
    hangers: set[int],
    failing: set[int],
    accidents: list[str],
    refusals: int,
    blocks: set[int],
    replicas: int,
    rows: int,
    max_attempts: int,
    seed: int,
) -> None:
    """A row is guilty if it kills or hangs each replica that runs it, or always fails. Finding one
    that kills costs at most two deaths more than a call may have."""
    chunks = named(sizes)
    names = [name for chunk in chunks for name in chunk]
    guilty = {f"r{n}" for n in killers | hangers} & set(names)
    bad = {f"r{n}" for n in failing} - guilty
    fleet = SimulatedFleet(
        Schedule(
            seed=seed,
            replicas=replicas,
            killers=frozenset(f"r{n}" for n in killers),
            hangers=frozenset(f"r{n}" for n in hangers - killers),
            failing=frozenset(bad),
            accidents=accidents,  # type: ignore[arg-type]
            refusals=refusals,
        )
    )

    attempted, hours = dispatch(fleet, chunks, rows=rows, max_attempts=max_attempts, blocks=blocks)

    assert [row.result.id for chunk in attempted for row in chunk] == names
    found = codes(attempted)
    assert {n for n, code in found.items() if code == "poison_row"} == guilty
    assert {n for n, code in found.items() if code == "inference_failed"} == bad & set(names)
    assert all(
        row.result.text == f"text of {row.result.id}"
        for chunk in attempted
        for row in chunk
        if row.result.error_code is None
    )
    for number, chunk in enumerate(attempted):
        assert {row.in_block for row in chunk} == {number in blocks}
        twins = [row.dense for row in chunk if row.dense is not None]
        assert 2 * len(twins) >= len(chunk) or not twins, "few twins say nothing"
    assert fleet.deaths_by_rows <= (max_attempts + 2) * len(guilty)
    assert hours < 1.5 * (1 + len(accidents)) + len(guilty)


def test_a_row_that_kills_replicas_costs_two_deaths_more_than_a_call_may_have() -> None:
    fleet = SimulatedFleet(Schedule(replicas=4, killers=frozenset({"r5"})))
    events: Counter[RunEvent] = Counter()
    attempted, _ = dispatch(fleet, named([16] * 12), rows=64, max_attempts=3, events=events)
    assert [name for name, code in codes(attempted).items() if code] == ["r5"]
    assert fleet.deaths_by_rows == 5
    assert attempted[0][5].attempts == 5
    assert events[RunEvent.REPLICA_DIED] == 5
    assert events[RunEvent.ROW_QUARANTINED] >= 16


def test_other_replicas_work_while_a_suspect_runs_alone_on_one() -> None:
    fleet = SimulatedFleet(Schedule(replicas=4, hangers=frozenset({"r5"})))
    dispatch(fleet, named([4] * 300), rows=16)
    assert fleet.calls_beside_alone > 10


def test_a_neighbour_on_the_replica_of_a_poison_row_is_answered_in_one_piece() -> None:
    """Its call runs alone at most once and is answered, rather than taken apart."""
    fleet = SimulatedFleet(Schedule(replicas=1, killers=frozenset({"r0"})))
    attempted, _ = dispatch(fleet, named([8] * 6), rows=48)
    calls = [{row.attempts for row in rows} for rows in attempted[1:]]
    assert max(calls, key=max) == {3}
    assert [rows for rows in calls if len(rows) > 1] == []


def test_an_answer_after_the_deadline_is_dropped_and_the_rows_are_sent_again() -> None:
    events: Counter[RunEvent] = Counter()
    fleet = SimulatedFleet(Schedule(accidents=["late"], seed=1))
    attempted, hours = dispatch(fleet, named([4] * 12), events=events)
    assert set(codes(attempted).values()) == {None}
    assert set(fleet.answered.values()) == {1}
    assert events[RunEvent.CALL_TIMED_OUT] == 1
    assert hours < 1.5


def test_failed_rows_are_asked_once_more_alone_and_then_believed() -> None:
    events: Counter[RunEvent] = Counter()
    fleet = SimulatedFleet(Schedule(accidents=["fail"], failing=frozenset({"r40"}), seed=1))
    attempted, _ = dispatch(fleet, named([16] * 3), events=events)
    rows = {row.result.id: row for chunk in attempted for row in chunk}
    assert [name for name, row in rows.items() if row.result.error_code] == ["r40"]
    assert rows["r40"].attempts == 2
    assert Counter(row.attempts for row in rows.values()) == {1: 31, 2: 17}
    assert events[RunEvent.INFER_RETRIED] == 17


class MeasuredReplicas(SimulatedFleet):
    """Answers blocks as given."""

    def __init__(self, answers: BlockAnswers) -> None:
        super().__init__(Schedule())
        self.given = answers

    async def label_block(
        self, requests: Sequence[LabelRequest], *, dense_first: bool
    ) -> BlockAnswers:
        return self.given


def answered(names: str, seconds: float = 1.0, failed: str = "") -> list[Result]:
    return [
        Result(id=name, text=None, seconds=seconds, error_code="image_missing")
        if name in failed
        else Result(id=name, text=f"text of {name}", seconds=seconds)
        for name in names
    ]


def dispatch_block(answers: BlockAnswers) -> list[AttemptedRow]:
    ((rows,), _) = dispatch(MeasuredReplicas(answers), [list("abcd")], blocks={0})
    return rows


def test_rows_of_a_block_have_their_own_twins_and_share_what_was_discarded() -> None:
    dense = answered("dcba", 3.0)
    rows = dispatch_block(even_block(answered("abcd"), dense, discarded_seconds=2.0))
    assert [row.dense and row.dense.id for row in rows] == list("abcd")
    assert {row.discarded_seconds for row in rows} == {0.5}


@pytest.mark.parametrize(
    ("failed", "failed_densely", "twins"),
    [
        ("", "a", 3),
        ("a", "", 3),
        ("ab", "ab", 2),  # both ways, for want of an image say
        ("abc", "abc", 0),  # less than half is left
        ("", "ab", 0),  # too many one way alone
        ("a", "b", 0),
    ],
)
def test_a_block_that_is_not_answered_both_ways_says_nothing(
    failed: str, failed_densely: str, twins: int
) -> None:
    """Then its dense seconds were for nothing, as are those of a row whose pruned twin failed."""
    dense = answered("abcd", 3.0, failed=failed_densely)
    rows = dispatch_block(even_block(answered("abcd", failed=failed), dense))
    assert sum(row.dense is not None for row in rows) == twins
    discarded = sum(row.discarded_seconds for row in rows)
    assert discarded == pytest.approx(12.0 - 3.0 * twins)
    assert {row.in_block for row in rows} == {True}


def test_a_spoiled_block_has_no_twins_and_its_rows_are_answers() -> None:
    rows = dispatch_block(even_block(answered("abcd"), None, discarded_seconds=4.0))
    assert [row.dense for row in rows] == [None] * 4
    assert [row.result.text for row in rows] == [f"text of {name}" for name in "abcd"]
    assert sum(row.discarded_seconds for row in rows) == 4.0


class Replicas:
    """Replicas that answer, or not, as the subclass says; alone like beside others."""

    calls = 0

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        raise NotImplementedError

    async def label_alone(
        self, requests: Sequence[LabelRequest]
    ) -> AsyncGenerator[list[Result] | None]:
        yield None
        yield await self.label(requests, priority=Priority.BATCH)

    async def label_block(
        self, requests: Sequence[LabelRequest], *, dense_first: bool
    ) -> BlockAnswers:
        raise AssertionError("nothing is measured here")


class BrokenReplicas(Replicas):
    """Each call raises `error` after 30 seconds, or never ends for None."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        self.calls += 1
        await asyncio.sleep(1e9 if self.error is None else 30.0)
        assert self.error is not None
        raise self.error


@pytest.mark.parametrize(
    ("error", "told", "hours"),
    [
        (ActorDiedError(), "ActorDiedError", 2),
        (TypeError("a bug"), "TypeError: a bug", 2),
        (Busy("full"), "Busy: full", 9),
        (None, "no answer in 3600 s", 9),
    ],
)
def test_a_fleet_that_answers_nothing_stops_the_run_with_what_happened(
    error: Exception | None, told: str, hours: int
) -> None:
    """Not one row of the 64 becomes an error row for it."""

    async def body() -> float:
        dispatcher = Dispatcher(BrokenReplicas(error), admission=Admission(rows=16), max_attempts=3)
        calls = [[LabelRequest(id=f"{c}:{n}", prompt="p") for n in range(4)] for c in range(16)]
        tasks = [asyncio.ensure_future(dispatcher.dispatch(call)) for call in calls]
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, FleetUnstable)
            assert told in str(outcome)
        return asyncio.get_running_loop().time() / HOUR

    assert run_in_virtual_time(body()) < hours


def test_a_fleet_that_breaks_after_many_answers_stops_the_run_and_convicts_no_row() -> None:
    class Breaking(Replicas):
        async def label(
            self, requests: Sequence[LabelRequest], *, priority: Priority
        ) -> list[Result]:
            self.calls += 1
            await asyncio.sleep(1.0)
            if self.calls > 500:
                raise ActorDiedError
            return [Result(id=request.id, text="x") for request in requests]

    async def body() -> None:
        replicas = Breaking()
        dispatcher = Dispatcher(replicas, admission=Admission(rows=16), max_attempts=3)
        calls = [[LabelRequest(id=f"{c}:{n}", prompt="p") for n in range(4)] for c in range(600)]
        tasks = [asyncio.ensure_future(dispatcher.dispatch(call)) for call in calls]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        answered = [rows for rows in outcomes if not isinstance(rows, BaseException)]
        assert len(answered) == 500
        assert {row.result.error_code for rows in answered for row in rows} == {None}
        assert replicas.calls < 800
        # A run whose budget is spent ends with the next fault.
        with pytest.raises(FleetUnstable):
            await dispatcher.dispatch(calls[0])

    run_in_virtual_time(body())


def test_replicas_that_are_busy_for_long_are_waited_for_while_others_are_answered() -> None:
    class Queueing(Replicas):
        """Refuses the call "b" until all others are answered, after hours."""

        async def label(
            self, requests: Sequence[LabelRequest], *, priority: Priority
        ) -> list[Result]:
            if requests[0].id == "b" and self.calls < 40:
                raise Busy("full")
            await asyncio.sleep(400.0)
            self.calls += 1
            return [Result(id=request.id, text="x") for request in requests]

    async def body() -> None:
        dispatcher = Dispatcher(Queueing(), admission=Admission(rows=2), max_attempts=1)
        names = ["b", *(f"r{n}" for n in range(40))]
        calls = [[LabelRequest(id=name, prompt="p")] for name in names]
        attempted = await asyncio.gather(*(dispatcher.dispatch(call) for call in calls))
        assert {row.attempts for rows in attempted for row in rows} == {1}

    run_in_virtual_time(body())


def test_rows_in_flight_never_exceed_the_admission_bound() -> None:
    class Counting(Replicas):
        in_flight = most = 0

        async def label(
            self, requests: Sequence[LabelRequest], *, priority: Priority
        ) -> list[Result]:
            self.in_flight += sum(len(image or b"") for r in requests for image in r.images)
            self.most = max(self.most, self.in_flight)
            await asyncio.sleep(1.0)
            self.in_flight -= sum(len(image or b"") for r in requests for image in r.images)
            return [Result(id=request.id, text="x") for request in requests]

    async def body(admission: Admission) -> int:
        replicas = Counting()
        dispatcher = Dispatcher(replicas, admission=admission, max_attempts=1)
        calls = [[LabelRequest(id=str(n), prompt="p", images=(b"x" * 10,))] for n in range(20)]
        await asyncio.gather(*(dispatcher.dispatch(call) for call in calls))
        return replicas.most

    assert run_in_virtual_time(body(Admission(rows=3))) == 30
    assert run_in_virtual_time(body(Admission(rows=9, size=50))) == 50
