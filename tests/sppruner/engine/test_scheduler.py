"""The waiting line: priority first, then arrival; groups within their limits; nobody forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppruner.engine.scheduler import PrefillLimits, Scheduler
from sppruner.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class Asking:
    number: int
    kind: str = "a"
    exclusive: bool = False
    priority: int = 1
    tokens: int = 10
    patches: int = 10


def waiting(*requests: Asking, limits: PrefillLimits | None = None) -> Scheduler[Asking]:
    line: Scheduler[Asking] = Scheduler(limits or PrefillLimits())
    for request in requests:
        line.add(request)
    return line


Requests = st.lists(
    st.builds(
        Asking,
        number=st.integers(),
        kind=st.sampled_from("ab"),
        priority=st.integers(0, 2),
        tokens=st.integers(1, 50),
        patches=st.integers(0, 50),
    ),
    max_size=30,
)


@given(requests=Requests, rows=st.integers(1, 8), tokens=st.integers(1, 120))
def test_everyone_is_taken_once_in_groups_that_fit(
    requests: list[Asking], rows: int, tokens: int
) -> None:
    limits = PrefillLimits(tokens=tokens, patches=80)
    line = waiting(*requests, limits=limits)
    taken: list[Asking] = []
    while line:
        best = min(request.priority for request in line)
        group = line.take(rows)
        assert group[0].priority == best
        assert len({request.kind for request in group}) == 1
        assert len(group) <= rows
        padded = len(group) * max(request.tokens for request in group)
        patches = sum(request.patches for request in group)
        assert len(group) == 1 or (padded <= tokens and patches <= 80)
        taken += group
    assert sorted(map(id, taken)) == sorted(map(id, requests))
    for kind in "ab":
        for priority in range(3):
            mine = [r for r in requests if (r.kind, r.priority) == (kind, priority)]
            order = [r for r in taken if (r.kind, r.priority) == (kind, priority)]
            assert list(map(id, order)) == list(map(id, mine)), "first come, first served"


def test_a_request_of_another_kind_keeps_its_place_and_leads_the_next_group() -> None:
    line = waiting(Asking(number=0), Asking(number=1, kind="b"), Asking(number=2))
    assert [request.number for request in line.take(8)] == [0, 2]
    assert [request.number for request in line.take(8)] == [1]


def test_a_request_larger_than_every_limit_is_read_by_itself() -> None:
    huge = Asking(number=0, tokens=10**6, patches=10**6)
    line = waiting(huge, Asking(number=1))
    assert line.take(8) == [huge]
    assert len(line) == 1


def test_requests_that_run_by_themselves_stay_together_and_are_read_in_parts() -> None:
    controls = [Asking(number=n, exclusive=True) for n in range(5)]
    line = waiting(*controls, limits=PrefillLimits(tokens=20, patches=1000))
    group = line.take(8)
    assert group == controls
    assert list(line.split(group)) == [controls[:2], controls[2:4], controls[4:]]


def test_one_that_does_not_fit_beside_those_that_run_holds_up_those_behind_it() -> None:
    line = waiting(Asking(number=0), Asking(number=1, tokens=50), Asking(number=2))
    taken = line.take(8, lambda group: sum(request.tokens for request in group) < 30)
    assert [request.number for request in taken] == [0]
    assert line.take(8, lambda _: False) == []
    assert [request.number for request in line] == [1, 2]


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"patches": -1}])
def test_limits_that_let_nothing_in_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="give at least 1"):
        PrefillLimits(**bad)
