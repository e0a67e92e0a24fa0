"""Suite `saving`: what a run prints is compared with what separate runs took."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyarrow as pa
import pytest
from rich.console import Console

from cluster.accounting.ledger import UnitLedger
from cluster.accounting.speedup import NANO, MeasuredRatio
from cluster.output.summary import Summary
from cluster.store import open_store
from jobs.suites import saving
from jobs.suites.saving import SavingRound, compare_units, run_saving_suite
from jobs.suites.shapes import SHAPES
from tests.cluster.corpora import plan, put_parquet


def measured(low: float | None, high: float | None) -> Summary:
    found = MeasuredRatio(ratio=2.0, low=low, high=high, rows=96, blocks=6)
    return cast(Summary, SimpleNamespace(measured=found))


@pytest.mark.parametrize(
    ("low", "high", "separate", "share", "holds", "agrees"),
    [
        (1.5, 2.5, 1.6, 1.0, True, True),
        (1.5, 2.5, 2.6, 1.0, False, False),
        (1.6, 2.5, 1.5, 1.0, False, False),
        (1.6, 2.5, 1.5, 1.3, False, True),  # a separate ratio that is uncertain too
        (1.9, 2.1, 1.5, 1.3, False, False),
        (None, None, 2.0, 1.3, False, False),
    ],
)
def test_the_interval_holds_the_separate_ratio_and_both_agree_or_not(
    low: float | None, high: float | None, separate: float, share: float, holds: bool, agrees: bool
) -> None:
    """share: high end of the separate interval over its ratio."""
    taken = MeasuredRatio(
        ratio=separate, low=separate / share, high=separate * share, rows=96, blocks=6
    )
    one = SavingRound(measured=measured(low, high), separate=taken, wall=1.0)
    assert (one.holds, one.agrees) == (holds, agrees)


def test_separate_runs_are_compared_unit_by_unit(tmp_path: Path) -> None:
    corpus = pa.table({"image": [b"x"] * 24})
    put_parquet(open_store(tmp_path / "in"), "a.parquet", corpus)
    for name, seconds in (("pruned", 1.0), ("dense", 2.5)):
        planned = plan(f"{tmp_path}/in", f"{tmp_path}/{name}", unit_rows=4)
        for number, unit in enumerate(planned.units):
            spent = round(seconds * (1 + number / 10) * NANO)
            ledger = UnitLedger(rows=4, nanoseconds=spent)
            planned.output.commit_unit(unit.unit_id, pa.table({"a": [1]}), ledger, writer="w")
    found = compare_units(f"{tmp_path}/pruned", f"{tmp_path}/dense")
    assert (found.blocks, found.rows) == (6, 24)
    assert found.ratio == pytest.approx(2.5)
    assert found.low == pytest.approx(2.5), "each unit took 2.5 times as long"


def test_questions_of_one_image_stand_together_and_are_different() -> None:
    rows = saving._draw(SHAPES["tiny"], 12, 5, seed=3)
    assert len(rows) == 12
    assert len({row.key for row in rows}) == 12
    images = [row.image for row in rows]
    assert images[:5] == [images[0]] * 5 != images[5:10]
    assert len({row.question for row in rows[:5]}) == 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_runs_of_each_case_are_compared(
    serving: str, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.suites.saving._NEW_TOKENS", 2)
    monkeypatch.setattr("jobs.suites.saving._LONGER", 1)
    found = run_saving_suite(SHAPES["tiny"], quick=True, root=s3, console=Console(quiet=True))
    one, five = found["cases"]
    assert (one["rows"], five["rows"]) == (384, 384)
    assert one["interval_low"] < one["printed"]["value"] < one["interval_high"]
    assert five["measuring"]["value"] > 0
    assert one["separate_low"] < one["separate"]["value"] < one["separate_high"]
    assert one["doubts"] == five["doubts"] == "0 of 1"
    for asked in (1, 5):
        ratio = found["ratios"][f"printed_vs_separate_{asked}_questions"]
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
