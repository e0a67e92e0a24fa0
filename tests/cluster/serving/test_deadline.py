"""Deadlines: how long a piece of work may take before it counts as hung."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.serving.deadline import Deadline


def test_the_first_pieces_have_long_and_later_ones_twenty_times_the_slowest() -> None:
    deadline = Deadline(first=600, least=120, learning=2)
    assert deadline.seconds == 600
    deadline.observe(10)
    assert deadline.seconds == 600
    deadline.observe(1)
    assert deadline.seconds == 200
    assert Deadline(first=600, least=120, learning=0).seconds == 120


def test_one_very_slow_piece_does_not_make_the_next_hang_last_for_days() -> None:
    deadline = Deadline(first=600, least=120)
    deadline.observe(100)
    assert deadline.seconds == 600
    deadline.observe(3000)
    assert deadline.seconds == 6000


@given(
    first=st.floats(0.1, 1e4),
    least=st.floats(0.1, 1e4),
    learning=st.integers(0, 5),
    took=st.lists(st.floats(0, 1e5), max_size=10),
)
def test_work_that_was_done_before_is_never_taken_for_hung(
    first: float, least: float, learning: int, took: list[float]
) -> None:
    deadline = Deadline(first=first, least=least, learning=learning)
    for seconds in took:
        deadline.observe(seconds)
    assert deadline.seconds >= max([least, *(2 * seconds for seconds in took)])
    assert deadline.seconds <= max([first, least, *(2 * seconds for seconds in took)])
