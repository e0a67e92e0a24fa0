"""The measured ratio: each batch is one observation, and one batch gives no interval."""

from __future__ import annotations

import pytest

from cluster.accounting.ledger import RunLedger, UnitLedger
from cluster.accounting.speedup import measured_ratio


def test_the_measured_ratio_weights_rows_by_their_seconds() -> None:
    pairs = ((1_000, 3_000), (3_000, 5_000))
    ratio = RunLedger.of([UnitLedger(control_pairs=pairs)]).measured_ratio()
    assert ratio is not None
    assert ratio.ratio == pytest.approx(2.0)
    assert (ratio.rows, ratio.batches) == (2, 2)
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low <= ratio.ratio <= ratio.high


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


def test_one_batch_gives_a_ratio_but_no_interval() -> None:
    ratio = RunLedger.of([UnitLedger(control_pairs=((1, 2), (1, 2)))]).measured_ratio()
    assert ratio is not None
    assert (ratio.ratio, ratio.low, ratio.high, ratio.rows) == (2.0, None, None, 2)


@pytest.mark.parametrize("pairs", [(), ((0, 5), (0, 7))])
def test_rows_without_pruned_seconds_give_no_ratio(pairs: tuple[tuple[int, int], ...]) -> None:
    assert measured_ratio(pairs) is None
