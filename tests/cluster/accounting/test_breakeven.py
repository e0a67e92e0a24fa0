"""The break-even decision: rows are pruned only if pruning pays with certainty."""

from __future__ import annotations

import pytest

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.speedup import MeasuredRatio
from sppruner.engine.interface import Result
from sppruner.spec import DENSE, Budget, PruneSpec

SPEC = PruneSpec(method="grid", budget=Budget(ratio=0.5))


def measured_decision(low: float | None, high: float | None = 9.0) -> BreakEven:
    return BreakEven(measured=MeasuredRatio(ratio=1.5, low=low, high=high, rows=8, batches=2))


@pytest.mark.parametrize(
    ("decision", "pays"),
    [
        (measured_decision(1.01), True),
        (measured_decision(1.0), False),
        (measured_decision(0.9), False),
        (measured_decision(None, None), False),
        (BreakEven(measured=None), False),
    ],
)
def test_rows_are_pruned_only_if_the_whole_interval_is_above_one(
    decision: BreakEven, pays: bool
) -> None:
    assert decision.pays is pays
    assert decision.spec(SPEC) == (SPEC if pays else DENSE)


@pytest.mark.parametrize("decision", [measured_decision(1.2), BreakEven(measured=None)])
def test_a_decision_round_trips_through_json(decision: BreakEven) -> None:
    assert BreakEven.from_dict(decision.to_dict()) == decision


def test_control_rows_that_failed_are_not_measured() -> None:
    answered = Result(id="a", text="x", seconds=1.0, control_seconds=2.0)
    failed = Result(id="b", text=None, error_code="image_missing")
    measured = BreakEven.from_results([answered, failed]).measured
    assert measured is not None
    assert (measured.ratio, measured.rows) == (2.0, 1)
    assert BreakEven.from_results([failed]).measured is None
