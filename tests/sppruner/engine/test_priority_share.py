"""Urgent requests go first, others are given their share: neither starves, whatever work costs."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

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
    st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 0.1)), max_size=80),
    st.integers(1, 8),
    st.floats(0.0, 1.0),
)
def test_rows_beside_urgent_ones_slow_a_step_down_by_the_slack_at_most(
    seen: list[tuple[int, float]], urgent: int, slack: float
) -> None:
    pace, sizes = DecodePace(), defaultdict[int, list[float]](list)
    for rows, seconds in seen:
        pace.observe(rows, seconds)
        sizes[(rows - 1).bit_length()].append(seconds)
    most = urgent + pace.rows_beside(urgent, slack)
    if most > urgent:
        alone, together = (median(sizes[(rows - 1).bit_length()][-15:]) for rows in (urgent, most))
        assert together <= alone * (1 + slack)


def test_a_jump_between_one_row_and_two_keeps_urgent_ones_alone() -> None:
    pace = DecodePace()
    assert pace.rows_beside(1, 0.2) == 0, "nothing is known"
    for rows, seconds in ((1, 1.5), (2, 2.4), (8, 2.4), (16, 2.6)):
        for _ in range(5):
            pace.observe(rows, seconds)
    assert pace.rows_beside(1, 0.2) == 0
    assert pace.rows_beside(2, 0.2) == 14, "from two to sixteen hardly anything changes"


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
