"""A handful of seeds; `python -m tests.chaos` runs any number."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.ground import Ground
from tests.chaos.run import run_schedule
from tests.chaos.schedule import draw_schedule

pytestmark = pytest.mark.slow

SEEDS = (3, 6, 16)


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground() as prepared:
        yield prepared


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_no_row_is_lost_and_no_run_is_stuck(ground: Ground, seed: int) -> None:
    report = run_schedule(draw_schedule(seed), ground)
    assert not report.findings, report.line()
