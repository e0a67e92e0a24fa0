"""Suite `scale`: its ratios are of cost per row, and its memory is that of one job."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from rich.console import Console

from jobs.suites.scale import SIZES, Pass, forget_peak, growth, peak_mib, scale


def passes(cost: dict[int, list[float]]) -> dict[int, list[Pass]]:
    """By size: seconds a row of ten times as many rows, by round."""
    return {
        size: [
            Pass(
                rows=10 * size,
                seconds=10 * size * seconds,
                planning_seconds=20 * size,
                objects_read=1,
                objects_written=1,
                peak_mib=None,
            )
            for seconds in cost[size]
        ]
        for size in SIZES
    }


def test_growth_compares_the_cost_of_a_row_within_each_round() -> None:
    cost = {size: [1.0, 10.0, 100.0] for size in SIZES} | {8: [2.0, 20.0, 100.0]}
    cost[16] = [3.0, 20.0, 400.0]
    found = growth(passes(cost))
    assert found == {
        "seconds_per_row_16x_vs_1x": {"value": 3.0, "low": 2.0, "high": 4.0},
        "seconds_per_row_16x_vs_8x": {"value": 1.5, "low": 1.0, "high": 4.0},
        "planning_seconds_per_row_16x_vs_1x": {"value": 1.0, "low": 1.0, "high": 1.0},
    }


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_peak_is_that_of_the_time_since_it_was_forgotten() -> None:
    assert forget_peak()
    before = peak_mib()
    held = np.ones(2**27, dtype=np.uint8)
    assert peak_mib() >= before + 120
    del held
    assert peak_mib() >= before + 120
    assert forget_peak()
    assert peak_mib() < before + 60


@pytest.mark.slow
def test_every_size_is_labelled_and_planned(serving: str, s3: str) -> None:
    found = scale("tiny-llava", base=4, rounds=2, quick=True, root=s3, told=Console(quiet=True))
    assert found["suite"] == "scale"
    assert (found["machine"]["base_rows"], found["machine"]["rounds"]) == (4, 2)
    assert [case["case"] for case in found["cases"]] == ["1x", "2x", "4x", "8x", "16x"]
    for size, case in zip(SIZES, found["cases"], strict=True):
        assert case["rows"] == case["units"] == case["objects_read"] == 4 * size
        assert case["objects_written"] >= case["units"] + 2  # manifest and summary
        for figure in ("seconds", "rows_per_second", "seconds_per_row", "planning_seconds"):
            assert 0 < case[figure]["low"] <= case[figure]["value"] <= case[figure]["high"]
        per_row = case["seconds"]["value"] / case["rows"]
        assert case["seconds_per_row"]["value"] == pytest.approx(per_row)
    for ratio in found["ratios"].values():
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
