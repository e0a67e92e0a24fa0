"""Rounds alternate, and figures are medians over rounds with their range."""

from __future__ import annotations

from jobs.suites.result import alternate, summarise_known_rounds, summarise_rounds


def test_every_second_round_is_reversed() -> None:
    assert [list(alternate("abc", number)) for number in range(3)] == [
        ["a", "b", "c"],
        ["c", "b", "a"],
        ["a", "b", "c"],
    ]


def test_a_figure_is_the_median_over_rounds_with_its_range() -> None:
    assert summarise_rounds([3.0, 1.0, 8.0]) == {"value": 3.0, "low": 1.0, "high": 8.0}
    assert summarise_known_rounds([3.0, 1.0, 8.0]) == summarise_rounds([3.0, 1.0, 8.0])


def test_a_figure_that_is_unknown_in_one_round_is_unknown() -> None:
    assert summarise_known_rounds([3.0, None]) is None
