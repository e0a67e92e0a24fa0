"""The break-even decision: rows are pruned only if pruning pays with certainty."""

from __future__ import annotations

import pytest

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.speedup import Block, MeasuredRatio
from sppruner.spec import DENSE, Budget, PruneSpec

SPEC = PruneSpec(method="grid", budget=Budget(ratio=0.5))


def measured_decision(low: float | None, high: float | None = 9.0) -> BreakEven:
    return BreakEven(measured=MeasuredRatio(ratio=1.5, low=low, high=high, rows=8, blocks=2))


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


@pytest.mark.parametrize(
    "decision",
    [
        measured_decision(1.2),
        BreakEven(measured=None),
        BreakEven.from_blocks(
            [Block(10, 20 + n, 8, "cpu") for n in range(5)], decisions=3, seconds=1.5
        ),
    ],
)
def test_a_decision_round_trips_through_json(decision: BreakEven) -> None:
    assert BreakEven.from_dict(decision.to_dict()) == decision


def test_a_decision_of_an_earlier_version_is_read() -> None:
    old = {"ratio": 1.5, "low": 1.2, "high": 1.9, "rows": 96, "batches": 6}
    measured = BreakEven.from_dict({"pays": True, "measured": old}).measured
    assert measured == MeasuredRatio(ratio=1.5, low=1.2, high=1.9, rows=96, blocks=6)


def test_of_several_decisions_each_takes_more() -> None:
    blocks = [Block(10, 20 + n % 3, 8) for n in range(6)]
    alone, one_of_six = (BreakEven.from_blocks(blocks, decisions=n).measured for n in (1, 6))
    assert alone is not None
    assert one_of_six is not None
    assert (one_of_six.low or 0) < (alone.low or 0) < (alone.high or 0) < (one_of_six.high or 0)
    assert BreakEven.from_blocks([]).measured is None
