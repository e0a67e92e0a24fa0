"""Control rows: whole calls, the configured share of the corpus, the same in every attempt."""

from __future__ import annotations

import pytest

from cluster.runs.control_sample import ControlSample


def sample(share: float, run_id: str = "run") -> ControlSample:
    return ControlSample(run_id, share=share, first_unit="first")


@pytest.mark.parametrize("rows", [16, 40, 64])
def test_units_with_fewer_rows_than_slots_keep_the_control_share(rows: int) -> None:
    share, units = 0.25, 400
    drawn = sum(len(sample(share).draw(f"u{n}", range(rows), slots=64)) for n in range(units))
    assert drawn / (rows * units) == pytest.approx(share, abs=0.06)


def test_every_attempt_draws_the_same_rows_and_another_run_draws_others() -> None:
    units = [f"u{n}" for n in range(20)]
    first, again = ([sample(0.5).draw(u, range(64), slots=16) for u in units] for _ in range(2))
    other = [sample(0.5, "other").draw(u, range(64), slots=16) for u in units]
    assert first == again
    assert first != other


def test_the_first_unit_always_has_a_control_call() -> None:
    assert len(sample(0.001).draw("first", range(64), slots=16)) == 16
    assert len(sample(0.001).draw("first", range(5), slots=16)) == 5
    assert not sample(0.0).draw("first", range(64), slots=16)
    assert not sample(0.5).draw("first", [], slots=16)
