"""The rule that stops an attempt: prompt wherever trouble begins, and deaf to all else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.accounting.error_share import ErrorShare
from cluster.accounting.ledger import UnitLedger

UNITS = st.lists(
    st.integers(1, 512).flatmap(lambda rows: st.tuples(st.just(rows), st.integers(0, rows))),
    max_size=40,
)
SHARES = st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0])


def unit(rows: int, failed: int) -> UnitLedger:
    return UnitLedger(rows=rows, failed={"read_failed": failed} if failed else {})


def stopped_at(units: list[tuple[int, int]], *, most: float, after: int = 500) -> int | None:
    """The number of the unit after which an attempt over these units stops; None if never."""
    share = ErrorShare(most=most, after=after, run_rows=0)
    for number, (rows, failed) in enumerate(units):
        share.add(unit(rows, failed))
        if share.reason is not None:
            return number
    return None


def exceeds(units: list[tuple[int, int]], most: float) -> bool:
    rows, failed = (sum(values) for values in zip(*units, strict=True))
    return failed > most * rows


def latest(units: list[tuple[int, int]], window: int) -> list[tuple[int, int]]:
    """The fewest units from the end that hold `window` rows; all where there are fewer rows."""
    for count in range(1, len(units)):
        if sum(rows for rows, _ in units[-count:]) >= window:
            return units[-count:]
    return units


@given(units=UNITS, most=SHARES, after=st.sampled_from([1, 500, 3000]))
def test_an_attempt_stops_at_the_first_unit_where_all_rows_or_the_latest_fail_too_often(
    units: list[tuple[int, int]], most: float, after: int
) -> None:
    expected = None
    for number in range(len(units)):
        so_far = units[: number + 1]
        enough = sum(rows for rows, _ in so_far) >= after
        window = latest(so_far, max(1000, after))
        if enough and (exceeds(so_far, most) or exceeds(window, most)):
            expected = number
            break
    assert stopped_at(units, most=most, after=after) == expected


@given(good=st.integers(0, 3000), rows=st.integers(1, 512))
def test_however_late_everything_begins_to_fail_few_rows_are_lost(good: int, rows: int) -> None:
    units = [(rows, 0)] * good + [(rows, rows)] * (3000 // rows + 2)
    number = stopped_at(units, most=0.2)
    assert number is not None
    lost = (number + 1 - good) * rows
    assert lost <= max(500, 0.2 * (1000 + rows)) + rows


@given(sizes=st.lists(st.integers(1, 50).map(lambda n: 10 * n), max_size=60))
def test_rows_that_fail_as_often_as_allowed_never_stop_an_attempt(sizes: list[int]) -> None:
    assert stopped_at([(rows, rows // 5) for rows in sizes], most=0.2) is None


@given(units=UNITS)
def test_a_share_of_one_never_stops(units: list[tuple[int, int]]) -> None:
    assert stopped_at(units, most=1.0, after=1) is None


def test_a_bad_file_of_a_large_corpus_does_not_stop_it_and_trouble_that_lasts_does() -> None:
    share = ErrorShare(most=0.2, after=500, run_rows=10_000_000)
    for _ in range(1000):
        share.add(unit(256, 0))
    for _ in range(40):
        share.add(unit(256, 256))
    assert share.reason is None
    for _ in range(40):
        share.add(unit(256, 256))
    assert share.reason is not None


def test_a_reason_stays_and_names_rows_codes_and_the_flag() -> None:
    share = ErrorShare(most=0.2, after=500, run_rows=0)
    share.add(unit(4000, 0))
    share.add(UnitLedger(rows=1000, failed={"read_failed": 150, "image_missing": 300}))
    assert share.reason is not None
    assert share.reason.startswith(
        "450 of the 1000 latest rows of this attempt failed (image_missing 300, read_failed 150)"
    )
    assert "20% that --max-error-share allows" in share.reason
    for _ in range(10):
        share.add(unit(1000, 0))
    assert share.reason is not None


@pytest.mark.parametrize(
    ("failed", "rows", "stops"),
    [(2, 10, False), (3, 10, True), (9, 9, False), (3, 20, False)],
)
def test_an_attempt_stops_only_above_the_share_and_after_enough_rows(
    failed: int, rows: int, stops: bool
) -> None:
    assert (stopped_at([(rows, failed)], most=0.2, after=10) is not None) is stops
