"""Suite `scale`: ratios compare the cost per row, and the memory peak is that of one job."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from rich.console import Console

from jobs.suites.scale import (
    SIZES,
    JobTiming,
    compare_row_costs,
    read_peak_mib,
    reset_peak,
    run_scale_suite,
)


def timings(seconds_per_row: dict[int, list[float]]) -> dict[int, list[JobTiming]]:
    """Timings by size, one per round; a size has ten times as many rows."""
    return {
        size: [
            JobTiming(
                rows=10 * size,
                seconds=10 * size * seconds,
                planning_seconds=20 * size,
                objects_read=1,
                objects_written=1,
                peak_mib=None,
            )
            for seconds in seconds_per_row[size]
        ]
        for size in SIZES
    }


def test_row_costs_are_compared_within_each_round() -> None:
    seconds_per_row = {size: [1.0, 10.0, 100.0] for size in SIZES} | {8: [2.0, 20.0, 100.0]}
    seconds_per_row[16] = [3.0, 20.0, 400.0]
    found = compare_row_costs(timings(seconds_per_row))
    assert found.pop("exponent")["low"] > 1.1
    assert found == {
        "seconds_per_row_16x_vs_1x": {"value": 3.0, "low": 2.0, "high": 4.0},
        "seconds_per_row_16x_vs_8x": {"value": 1.5, "low": 1.0, "high": 4.0},
        "planning_seconds_per_row_16x_vs_1x": {"value": 1.0, "low": 1.0, "high": 1.0},
    }


def test_the_exponent_of_a_flat_cost_is_one_in_every_round() -> None:
    found = compare_row_costs(timings({size: [1.0, 2.0] for size in SIZES}))
    assert found["exponent"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the peak")
def test_the_peak_is_that_of_the_time_since_its_reset() -> None:
    assert reset_peak()
    before = read_peak_mib()
    held = np.ones(2**27, dtype=np.uint8)
    assert read_peak_mib() >= before + 120
    del held
    assert read_peak_mib() >= before + 120
    assert reset_peak()
    assert read_peak_mib() < before + 60


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_size_is_labelled_and_planned(serving: str, s3: str) -> None:
    found = run_scale_suite(
        "tiny-llava", base_rows=4, rounds=2, quick=True, root=s3, console=Console(quiet=True)
    )
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
