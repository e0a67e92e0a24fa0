"""Seconds of rows: they add up to the time in which the replica had any, whatever came and went."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.serving.row_clock import RowClock, RowTimer


class Time:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rows_that_are_there_at_once_share_the_time() -> None:
    time = Time()
    clock = RowClock(time)
    first = clock.start()
    time.now = 2.0
    second = clock.start()
    time.now = 6.0
    assert first.stop() == pytest.approx(2.0 + 4.0 / 2)
    time.now = 7.0
    assert second.stop() == pytest.approx(4.0 / 2 + 1.0)


def test_a_row_ends_once() -> None:
    time = Time()
    clock = RowClock(time)
    row, other = clock.start(), clock.start()
    time.now = 1.0
    assert row.stop() == row.stop() == pytest.approx(0.5)
    time.now = 2.0
    assert row.stop() == pytest.approx(0.5)
    assert other.stop() == pytest.approx(1.5)


def test_time_without_rows_is_nobody_s() -> None:
    time = Time()
    clock = RowClock(time)
    clock.start().stop()
    time.now = 100.0
    row = clock.start()
    time.now = 101.0
    assert row.stop() == pytest.approx(1.0)


@given(
    st.lists(
        st.tuples(st.floats(0, 100, allow_subnormal=False), st.integers(0, 5), st.integers(0, 5)),
        max_size=40,
    )
)
def test_seconds_add_up_to_the_time_with_rows(events: list[tuple[float, int, int]]) -> None:
    """events: seconds that pass, rows that come then, and rows that end then."""
    time = Time()
    clock = RowClock(time)
    running: list[RowTimer] = []
    occupied = total = 0.0
    for passed, come, ended in events:
        time.now += passed
        occupied += passed if running else 0.0
        running += [clock.start() for _ in range(come)]
        total += sum(row.stop() for row in running[:ended])
        del running[:ended]
    total += sum(row.stop() for row in running)
    assert total == pytest.approx(occupied, abs=1e-6)
