"""Urgent requests go first, others are given their share: neither starves, whatever work costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppruner.engine.decode_pace import DecodePace
from sppruner.engine.prefill_pace import PrefillPace
from sppruner.engine.priority_share import OTHERS_SHARE, PriorityShare

SECONDS = st.floats(1e-4, 2.0)


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=200))
def test_each_side_has_its_share_up_to_one_piece_of_work(costs: list[tuple[float, float]]) -> None:
    share, spent = PriorityShare(), {True: 0.0, False: 0.0}
    for urgent, others in costs:
        by_others = share.others_next
        seconds = others if by_others else urgent
        share.spent(seconds, by_others=by_others)
        spent[by_others] += seconds
        most = max(max(pair) for pair in costs)
        assert abs(spent[True] - OTHERS_SHARE * sum(spent.values())) <= most


def test_nothing_is_owed_from_before() -> None:
    share = PriorityShare()
    assert not share.others_next
    share.spent(1.0, by_others=False)
    assert share.others_next
    share.end()
    assert not share.others_next


@given(
    st.floats(1e-4, 0.1),
    st.floats(1e-5, 0.1),
    st.lists(st.integers(1, 64), min_size=2, max_size=60).filter(lambda n: len(set(n)) > 1),
    st.integers(1, 8),
    st.floats(0.0, 1.0),
)
def test_rows_beside_urgent_ones_slow_a_step_down_by_the_slack_at_most(
    fixed: float, slope: float, seen: list[int], urgent: int, slack: float
) -> None:
    pace = DecodePace()
    for rows in seen:
        pace.observe(rows, fixed + slope * rows)
    more = pace.rows_beside(urgent, slack)
    alone = fixed + slope * urgent
    assert fixed + slope * (urgent + more) <= alone * (1 + slack) * 1.001
    if max(seen) - min(seen) > 8:
        assert fixed + slope * (urgent + more + 1) >= alone * (1 + slack) * 0.999


def test_no_row_is_added_before_it_is_known_what_rows_cost() -> None:
    pace = DecodePace()
    assert pace.rows_beside(1, 0.2) == 0
    for _ in range(20):
        pace.observe(16, 0.01)
    assert pace.rows_beside(1, 0.2) == 0
    pace.observe(1, 0.01)
    assert pace.rows_beside(1, 0.2) > 1000, "a step takes as long for one as for sixteen"


def test_a_pace_follows_what_was_seen() -> None:
    pace = PrefillPace()
    assert pace.tokens(1.0) is None
    pace.observe(0, 1.0)
    assert pace.tokens(1.0) is None
    pace.observe(100, 1.0)
    assert pace.tokens(0.5) == 50
    for _ in range(50):
        pace.observe(100, 2.0)
    assert pace.tokens(0.5) == pytest.approx(25, abs=1)
    assert pace.tokens(1e-9) == 1
