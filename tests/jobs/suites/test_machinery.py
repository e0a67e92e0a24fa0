"""Suite `machinery`: every row of every size is labelled; growth of memory is told from size."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from jobs.suites.machinery import _make_case, fit_exponent, run_machinery_suite, sample_memory
from sppruner.models.loading import EMBEDDED


def test_the_exponent_of_a_flat_cost_is_one() -> None:
    flat = fit_exponent([(10, 1.0), (100, 10.0), (1000, 100.0)])
    assert flat == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    steep = fit_exponent([(10, 1.0), (100, 10.0), (1000, 1000.0)])
    assert steep == pytest.approx({"value": 1.5, "low": 1.0, "high": 2.0})


def test_growth_is_that_behind_the_start() -> None:
    samples = [{"driver": 10.0}] + [{"driver": 100.0 + n} for n in range(19)]
    case = _make_case("1/1", 40, 2.0, 0.5, samples)
    assert case["rows_per_second"] == 20.0
    assert case["driver_mib"] == {"value": 109.5, "low": 101.0, "high": 118.0}
    assert case["driver_growth_mib"] == 117.5 - 101.5
    assert case["labeller_mib"] is None
    assert case["labeller_growth_mib"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_this_process_is_the_driver_and_memory_that_processes_share_is_not_its_own() -> None:
    pages = int(Path(f"/proc/{os.getpid()}/statm").read_text().split()[1])
    before = sample_memory()["driver"]
    assert before == pytest.approx(pages * 4096 / 2**20, rel=0.1)
    with mmap.mmap(-1, 2**28) as shared:
        shared.write(bytes(2**28))
        assert sample_memory()["driver"] - before < 100


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_jobs_of_every_size_are_measured(tmp_path: Path) -> None:
    found = run_machinery_suite(
        EMBEDDED, rows=1600, quick=True, root=str(tmp_path), console=Console(quiet=True)
    )
    assert [case["rows"] for case in found["cases"]] == [100, 200, 400, 800, 1600]
    assert [case["units"] for case in found["cases"]] == [1, 1, 2, 4, 7]  # of 256 rows
    assert found["cases"][-1]["replica_mib"]["value"] > 10
