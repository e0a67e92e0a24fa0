"""Patience: how long a piece of work may take before it counts as hung."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.serving.patience import Patience


def test_the_first_pieces_have_long_and_later_ones_twenty_times_the_slowest() -> None:
    patience = Patience(first=600, least=120, learning=2)
    assert patience.seconds == 600
    patience.observe(10)
    assert patience.seconds == 600
    patience.observe(1)
    assert patience.seconds == 200
    assert Patience(first=600, least=120, learning=0).seconds == 120


def test_one_very_slow_piece_does_not_make_the_next_hang_last_for_days() -> None:
    patience = Patience(first=600, least=120)
    patience.observe(100)
    assert patience.seconds == 600
    patience.observe(3000)
    assert patience.seconds == 6000


@given(
    first=st.floats(0.1, 1e4),
    least=st.floats(0.1, 1e4),
    learning=st.integers(0, 5),
    took=st.lists(st.floats(0, 1e5), max_size=10),
)
def test_work_that_was_done_before_is_never_taken_for_hung(
    first: float, least: float, learning: int, took: list[float]
) -> None:
    patience = Patience(first=first, least=least, learning=learning)
    for seconds in took:
        patience.observe(seconds)
    assert patience.seconds >= max([least, *(2 * seconds for seconds in took)])
    assert patience.seconds <= max([first, least, *(2 * seconds for seconds in took)])
