"""The scheduler: priority first, then arrival; groups within their limits; no request starves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppruner.engine.scheduler import PrefillLimits, Scheduler
from sppruner.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class Waiting:
    number: int
    kind: str = "a"
    priority: int = 1
    tokens: int = 10
    patches: int = 10


def scheduled(*requests: Waiting, limits: PrefillLimits | None = None) -> Scheduler[Waiting]:
    scheduler: Scheduler[Waiting] = Scheduler(limits or PrefillLimits())
    for request in requests:
        scheduler.add(request)
    return scheduler


Requests = st.lists(
    st.builds(
        Waiting,
        number=st.integers(),
        kind=st.sampled_from("ab"),
        priority=st.integers(0, 2),
        tokens=st.integers(1, 50),
        patches=st.integers(0, 50),
    ),
    max_size=30,
)


@given(requests=Requests, slots=st.integers(1, 8), tokens=st.integers(1, 120))
def test_every_request_is_taken_once_in_groups_that_fit(
    requests: list[Waiting], slots: int, tokens: int
) -> None:
    limits = PrefillLimits(tokens=tokens, patches=80)
    scheduler = scheduled(*requests, limits=limits)
    taken: list[Waiting] = []
    while scheduler:
        best = min(request.priority for request in scheduler)
        group = scheduler.take(slots)
        assert group[0].priority == best
        assert len({request.kind for request in group}) == 1
        assert len(group) <= slots
        padded = len(group) * max(request.tokens for request in group)
        patches = sum(request.patches for request in group)
        assert len(group) == 1 or (padded <= tokens and patches <= 80)
        taken += group
    assert sorted(map(id, taken)) == sorted(map(id, requests))
    for kind in "ab":
        for priority in range(3):
            arrived = [r for r in requests if (r.kind, r.priority) == (kind, priority)]
            order = [r for r in taken if (r.kind, r.priority) == (kind, priority)]
            assert list(map(id, order)) == list(map(id, arrived)), "FIFO"


def test_a_request_of_another_kind_keeps_its_place_and_leads_the_next_group() -> None:
    scheduler = scheduled(Waiting(number=0), Waiting(number=1, kind="b"), Waiting(number=2))
    assert [request.number for request in scheduler.take(8)] == [0, 2]
    assert [request.number for request in scheduler.take(8)] == [1]


def test_a_request_larger_than_every_limit_is_prefilled_by_itself() -> None:
    huge = Waiting(number=0, tokens=10**6, patches=10**6)
    scheduler = scheduled(huge, Waiting(number=1))
    assert scheduler.take(8) == [huge]
    assert len(scheduler) == 1


def test_a_request_that_does_not_fit_blocks_those_after_it() -> None:
    scheduler = scheduled(Waiting(number=0), Waiting(number=1, tokens=50), Waiting(number=2))
    taken = scheduler.take(8, lambda group: sum(request.tokens for request in group) < 30)
    assert [request.number for request in taken] == [0]
    assert scheduler.take(8, lambda _: False) == []
    assert [request.number for request in scheduler] == [1, 2]


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"patches": -1}])
def test_limits_below_1_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="give at least 1"):
        PrefillLimits(**bad)
