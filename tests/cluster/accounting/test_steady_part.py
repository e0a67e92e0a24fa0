"""The steady part of an arm gives the pace of a full replica, whatever it takes to fill it and
to empty it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.accounting.steady_part import BLOCK_SLOTS, steady_seconds
from tests.cluster.accounting.simulated_replica import answer_rows

SLOTS = 16


def pace(ended: dict[str, float], began: float = 0.0, slots: int = 1) -> float:
    steady = steady_seconds(ended, began, slots=slots)
    return math.fsum(steady.values()) / len(steady)


def named(times: list[float]) -> dict[str, float]:
    return {f"r{number}": time for number, time in enumerate(times)}


@pytest.mark.parametrize("spread", [0, 6, 12], ids="equal mixed varied".split())
@pytest.mark.parametrize("delay", [0.0, 3.0])
@pytest.mark.parametrize("failed", [0, 5, 16])
def test_the_ratio_of_short_blocks_is_that_of_a_long_run(
    spread: int, delay: float, failed: int
) -> None:
    """Thirty blocks of four rows a slot, some of which failed both ways, against a run of 5,000
    rows. By the time of whole arms the ratio would be off by up to a quarter."""
    draw = np.random.default_rng(spread)

    def lengths(rows: int) -> list[int]:
        return [int(n) for n in draw.integers(16 - spread, 16 + spread + 1, rows)]

    costs = {"pruned": 0.05, "dense": 0.25}
    whole = lengths(5_000)
    taken = {
        arm: answer_rows(whole, prefill=cost, step=0.1, slots=SLOTS) for arm, cost in costs.items()
    }
    true = max(taken["dense"]) / max(taken["pruned"])
    paces, totals = dict.fromkeys(costs, 0.0), dict.fromkeys(costs, 0.0)
    for _ in range(30):
        block = lengths(BLOCK_SLOTS * SLOTS - failed)
        for arm, cost in costs.items():
            times = answer_rows(block, prefill=cost, step=0.1, slots=SLOTS, began=delay)
            ended = named(times)
            paces[arm] += pace(ended, slots=SLOTS)
            totals[arm] += max(ended.values())
    assert paces["dense"] / paces["pruned"] == pytest.approx(true, rel=0.04)
    if spread or delay:
        assert totals["dense"] / totals["pruned"] < 0.97 * true


@given(
    batches=st.lists(st.integers(1, 16), min_size=3, max_size=20),
    seconds=st.floats(0.05, 5.0),
    jitter=st.floats(0.0, 0.01),
)
@example(batches=[1, 1, 10], seconds=1.0, jitter=0.004)  # most of the arm is one batch
def test_batches_count_whole(batches: list[int], seconds: float, jitter: float) -> None:
    """However the boundaries fall, in an arm whose batches all take one time a row. Its answers
    arrive within a moment, not all at once."""
    ended, now, row = dict[str, float](), 0.0, 0
    for size in batches:
        now += seconds * size
        for place in range(size):
            ended[f"r{row}"] = now + jitter * seconds * place / size
            row += 1
    assert pace(ended) == pytest.approx(seconds, rel=0.02)


@given(st.lists(st.floats(0.0, 1e6), max_size=40), st.permutations(range(40)))
def test_every_arm_has_a_steady_part_of_its_own_answers(
    times: list[float], order: list[int]
) -> None:
    ended = {f"r{order[number]}": time for number, time in enumerate(times)}
    steady = steady_seconds(ended, began=0.0, slots=1)
    assert bool(steady) == bool(ended)
    assert set(steady) <= set(ended)
    assert all(seconds >= 0 for seconds in steady.values())
    assert math.fsum(steady.values()) <= max(ended.values(), default=0.0) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([], []),
        ([2.0], [2.0]),
        ([1.0, 3.0], [1.0, 2.0]),
        ([9.0] * 8, [9.0] + [0.0] * 7),  # one batch: all of it, from the arm's beginning
        ([5.0, 6.0, 8.0, 9.0], [1.0, 2.0]),
        ([5.0] * 4 + [7.0] * 4, [2.0] + [0.0] * 3),
    ],
)
def test_the_middle_half_of_an_arm_is_steady(times: list[float], expected: list[float]) -> None:
    steady = steady_seconds(named(times), began=0.0, slots=1)
    assert list(steady.values()) == pytest.approx(expected)


def test_a_long_delay_at_the_start_is_nobody_s() -> None:
    early, late = (named([at + number for number in range(1, 17)]) for at in (0.0, 50.0))
    assert steady_seconds(early, 0.0, slots=4) == steady_seconds(late, 0.0, slots=4)


@pytest.mark.parametrize("rows_a_slot", [1, 2])
@pytest.mark.parametrize(
    ("pruned", "dense", "step"), [(0.05, 0.25, 0.1), (0.3, 1.0, 0.1), (0.015, 0.009, 0.047)]
)
def test_the_ratio_of_a_block_that_is_too_short_is_too_close_to_one(
    rows_a_slot: int, pruned: float, dense: float, step: float
) -> None:
    """And by no more than a fifth, whether pruning is faster or slower. Its middle half would be
    up to two thirds off, since it holds no prefill."""
    draw = np.random.default_rng(0)
    costs = {"pruned": pruned, "dense": dense}

    def lengths(rows: int) -> list[int]:
        return [int(n) for n in draw.integers(4, 29, rows)]

    def taken(lengths: list[int], cost: float) -> list[float]:
        return answer_rows(lengths, prefill=cost, step=step, slots=SLOTS)

    whole = lengths(3_000)
    true = max(taken(whole, dense)) / max(taken(whole, pruned))
    paces = dict.fromkeys(costs, 0.0)
    for _ in range(30):
        block = lengths(rows_a_slot * SLOTS)
        for arm, cost in costs.items():
            paces[arm] += pace(named(taken(block, cost)), slots=SLOTS)
    log_ratio, log_true = math.log(paces["dense"] / paces["pruned"]), math.log(true)
    assert 0 <= log_ratio / log_true <= 1.01
    assert abs(log_ratio - log_true) < 0.2
