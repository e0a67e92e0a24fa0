"""Suite `saving`: what a run prints is compared with what separate runs took."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console

from cluster.accounting.speedup import MeasuredRatio
from cluster.output.summary import Summary
from jobs.suites import saving
from jobs.suites.saving import SavingRound, run_saving_suite
from jobs.suites.shapes import SHAPES


def measured(low: float | None, high: float | None) -> Summary:
    found = MeasuredRatio(ratio=2.0, low=low, high=high, rows=96, blocks=6)
    return cast(Summary, SimpleNamespace(measured=found))


@pytest.mark.parametrize(
    ("low", "high", "separate", "holds"),
    [
        (1.5, 2.5, 1.6, True),
        (1.5, 2.5, 2.6, False),
        (1.5, 2.5, 1.4, False),
        (None, None, 2.0, False),
    ],
)
def test_an_interval_holds_the_separate_ratio_or_not(
    low: float | None, high: float | None, separate: float, holds: bool
) -> None:
    one = SavingRound(measured=measured(low, high), separate=separate, wall=1.0)
    assert one.holds is holds


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
    assert one["doubts"] == five["doubts"] == "0 of 1"
    for asked in (1, 5):
        ratio = found["ratios"][f"printed_vs_separate_{asked}_questions"]
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
