"""A saving is stated only where the control blocks speak for the run's rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.accounting.ledger import RunLedger, UnitLedger
from cluster.accounting.saving import Saving, saving_of
from cluster.accounting.speedup import NANO, Block

BLOCK = 64


def blocks(
    count: int = 6, *, pruned: float = 0.1, ratio: float = 3.0, device: str = "cpu"
) -> tuple[Block, ...]:
    """Of 64 rows; pruned: seconds of a row. They differ a little."""
    return tuple(
        Block(
            round(BLOCK * pruned * (1 + n / 100) * NANO),
            round(BLOCK * pruned * ratio * NANO),
            BLOCK,
            device,
        )
        for n in range(count)
    )


def ledger(*, pace: float = 0.1, rows: int = 10_000, **more: Any) -> UnitLedger:
    """Of so many rows outside six blocks, each of so many seconds."""
    values: dict[str, Any] = {
        "rows": rows + 6 * BLOCK,
        "nanoseconds": round((rows * pace + 6 * BLOCK * 0.1) * NANO),
        "nanoseconds_by_device": {"cpu": round((rows * pace + 6 * BLOCK * 0.1) * NANO)},
        "ordinary_rows": {"cpu": rows},
        "ordinary_nanoseconds": {"cpu": round(rows * pace * NANO)},
        "blocks": blocks(),
        "flops": {"vision": 500, "prefill": 500},
        "steady_flops": 100,
    }
    return UnitLedger(**values | more)


def saving(total: UnitLedger) -> Saving:
    measured = RunLedger(total=total).measured_ratio()
    assert measured is not None
    return saving_of(measured, total)


def test_the_saving_is_that_of_the_ratio_with_its_interval() -> None:
    total = ledger()
    measured = RunLedger(total=total).measured_ratio()
    found = saving(total)
    assert measured is not None
    assert found.seconds == pytest.approx(total.seconds * (measured.ratio - 1))
    assert found.low == pytest.approx(total.seconds * ((measured.low or math.nan) - 1))
    assert found.high == pytest.approx(total.seconds * ((measured.high or math.nan) - 1))
    assert not found.doubts
    assert found.shown


def test_below_five_blocks_nothing_is_shown() -> None:
    found = saving(ledger(blocks=blocks(4)))
    assert found.seconds is not None
    assert (found.low, found.high, found.shown) == (None, None, False)


@pytest.mark.parametrize(("ratio", "shown"), [(3.0, True), (0.5, True), (1.02, False)])
def test_what_may_be_nothing_is_not_shown(ratio: float, shown: bool) -> None:
    assert saving(ledger(blocks=blocks(ratio=ratio))).shown is shown


@given(st.floats(0.5, 20.0))
def test_rows_that_replicas_waited_for_give_no_saving(slower: float) -> None:
    """A run that its reader feeds with a tenth of what replicas could answer takes as long densely:
    by the blocks alone it would save twice its own time."""
    found = saving(ledger(pace=0.1 * slower))
    waited = slower > 1.3 * 1.025  # the mean of the blocks
    assert (found.seconds is None) == waited
    assert any("they were waited for" in doubt for doubt in found.doubts) == waited


def test_a_few_slow_rows_beside_the_blocks_are_no_doubt() -> None:
    """They run while replicas fill and empty. What counts is their time, not how many they are."""
    assert saving(ledger(rows=10, pace=0.3)).seconds is not None
    assert saving(ledger(rows=300, pace=0.5)).seconds is None


def test_each_kind_of_device_is_compared_with_itself() -> None:
    """Eight in ten of the rows ran on the slow kind, three in ten of the blocks."""
    total = ledger(
        rows=10_000,
        blocks=(*blocks(7, pruned=0.1, device="gpu"), *blocks(3, pruned=0.8, device="cpu")),
        ordinary_rows={"gpu": 2_000, "cpu": 8_000},
        ordinary_nanoseconds={"gpu": 200 * NANO, "cpu": 6_400 * NANO},
        nanoseconds_by_device={"gpu": 250 * NANO, "cpu": 6_600 * NANO},
    )
    assert not saving(total).doubts
    slower = {"gpu": 400 * NANO, "cpu": 12_800 * NANO}
    assert saving(replace(total, ordinary_nanoseconds=slower)).doubts
    # A kind without a block is compared with nothing.
    assert not saving(
        replace(
            total,
            ordinary_rows={"gpu": 2_000, "cpu": 8_000, "H200": 9_000},
            ordinary_nanoseconds=dict(total.ordinary_nanoseconds) | {"H200": 50 * NANO},
        )
    ).doubts


@pytest.mark.parametrize(
    ("of_all", "steady", "doubted"),
    [(0, 0, False), (500, 45, False), (500, 30, True), (0, 20, True)],
)
def test_caches_that_served_other_shares_are_a_doubt(
    of_all: int, steady: int, doubted: bool
) -> None:
    """Of 1,000 FLOPs of all rows and 100 of the steady parts."""
    found = saving(ledger(flops_cached={"vision": of_all}, steady_flops_cached=steady))
    assert any("caches spared" in doubt for doubt in found.doubts) == doubted


@pytest.mark.parametrize(("spoiled", "doubted"), [(0, False), (1, False), (2, True)])
def test_many_spoiled_blocks_are_a_doubt(spoiled: int, doubted: bool) -> None:
    found = saving(ledger(blocks_spoiled=spoiled))
    assert any("were spoiled" in doubt for doubt in found.doubts) == doubted
    assert not saving(ledger(blocks=blocks(20), blocks_spoiled=spoiled)).doubts


@pytest.mark.parametrize(("share", "doubted"), [(0.04, False), (0.06, True)])
def test_a_kind_of_device_without_a_block_is_a_doubt(share: float, doubted: bool) -> None:
    total = ledger()
    spent = total.nanoseconds
    kinds = {"cpu": round((1 - share) * spent), "H200": round(share * spent)}
    found = saving(replace(total, nanoseconds_by_device=kinds))
    assert any("no control block ran on H200" in doubt for doubt in found.doubts) == doubted


def test_blocks_of_no_pruned_time_are_compared_with_nothing() -> None:
    """Of one kind of two, by a clock too coarse for it: no ratio of paces, and no error."""
    kinds = {"gpu": 10 * NANO, "cpu": 990 * NANO}
    total = ledger(
        blocks=(*blocks(5, device="cpu"), Block(0, 10, BLOCK, "gpu")),
        nanoseconds_by_device=kinds,
        ordinary_rows={"gpu": 10_000},
        ordinary_nanoseconds={"gpu": 10 * NANO},
    )
    assert not saving(total).doubts


def test_ledgers_of_earlier_versions_cast_no_doubt_they_cannot_know_of() -> None:
    old = ledger(ordinary_rows={}, ordinary_nanoseconds={}, steady_flops=0)
    assert not saving(replace(old, flops_cached={"vision": 900})).doubts
    assert not saving(replace(old, nanoseconds=0, nanoseconds_by_device={"cpu": 0})).doubts
