"""The measured ratio: each batch is one observation, and few batches give no interval."""

from __future__ import annotations

import math

import pytest

from cluster.accounting.ledger import RunLedger, UnitLedger
from cluster.accounting.speedup import measured_ratio


def test_the_measured_ratio_weights_rows_by_their_seconds() -> None:
    pairs = ((1_000, 3_000), (3_000, 5_000))
    ratio = RunLedger.of([UnitLedger(control_pairs=pairs)]).measured_ratio()
    assert ratio is not None
    assert ratio.ratio == pytest.approx(2.0)
    assert (ratio.rows, ratio.batches) == (2, 2)


def test_the_interval_is_student_s_t_over_batches_of_equal_weight() -> None:
    """By hand: differences of shares -0.1, 0.1, -0.2, 0.2 and 0, each divided by 0.8; the sum of
    their squares is 0.15625, and t is 2.776 with four degrees of freedom."""
    dense = [100, 300, 0, 400, 200]
    found = measured_ratio([(200, n + 1) for n in dense])
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert math.log(found.high / found.ratio) == pytest.approx(2.776 * 0.15625**0.5, rel=0.02)
    assert found.ratio / found.low == pytest.approx(found.high / found.ratio)


def test_batches_that_say_nothing_give_no_interval() -> None:
    found = measured_ratio([(1, 1), (1, 2), (1, 3), (1, 4), (247, 1)])
    assert found is not None
    assert found.low is found.high is None


def test_rows_of_one_batch_do_not_narrow_the_interval() -> None:
    """A row's seconds are those of its batch divided by its rows, so eight equal rows are one
    measurement."""
    pairs = tuple((1_000 + 37 * n, 2_000 + 311 * (n % 3)) for n in range(6))
    once = RunLedger.of([UnitLedger(control_pairs=pairs)]).measured_ratio()
    eightfold = RunLedger.of([UnitLedger(control_pairs=pairs * 8)]).measured_ratio()
    assert once is not None
    assert eightfold is not None
    assert eightfold.rows == 48
    assert (eightfold.low, eightfold.high) == pytest.approx((once.low, once.high))


@pytest.mark.parametrize("batches", [1, 4])
def test_few_batches_give_a_ratio_but_no_interval(batches: int) -> None:
    pairs = tuple((n, 2 * n) for n in range(1, batches + 1)) * 2
    ratio = RunLedger.of([UnitLedger(control_pairs=pairs)]).measured_ratio()
    assert ratio is not None
    assert (ratio.ratio, ratio.low, ratio.high) == (2.0, None, None)
    assert (ratio.rows, ratio.batches) == (2 * batches, batches)


@pytest.mark.parametrize("pairs", [(), ((0, 5), (0, 7))])
def test_rows_without_pruned_seconds_give_no_ratio(pairs: tuple[tuple[int, int], ...]) -> None:
    assert measured_ratio(pairs) is None
