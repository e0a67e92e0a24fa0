"""Intervals hold the true ratio as often as they say, in simulated runs: few and many blocks, of
equal and of skewed sizes, on machines that are steady, or drift, and in corpora of unequal images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest

from cluster.accounting.speedup import NANO, Block, measured_ratio
from cluster.accounting.steady_part import BLOCK_SLOTS, steady_seconds
from tests.cluster.accounting.simulated_replica import Pace, answer_rows

Pairs: TypeAlias = tuple[np.ndarray, np.ndarray]
RUNS, RATIO = 2_000, 2.5


def steady(draw: np.random.Generator, blocks: int, ratio: float) -> Pairs:
    """Equal blocks, and 10 % of noise on each side."""
    pruned, dense = np.exp(0.1 * draw.standard_normal((2, blocks)))
    return pruned, ratio * dense


def skewed(draw: np.random.Generator, blocks: int, ratio: float) -> Pairs:
    """Answers of very unequal length, so that blocks take 0.3 to 3 s, and delays that only add."""
    size = np.exp(0.6 * draw.standard_normal(blocks))
    pruned, dense = 1 + 0.2 * (draw.gamma(2.0, 0.5, (2, blocks)) - 1)
    return size * pruned, ratio * size * dense


def drifting(draw: np.random.Generator, blocks: int, ratio: float) -> Pairs:
    """A machine whose speed walks 15 % from one side of a block to the next; which is first
    alternates."""
    first, second = np.exp(np.cumsum(0.15 * draw.standard_normal(2 * blocks))).reshape(-1, 2).T
    pruned_first = draw.permutation(np.arange(blocks) % 2) == 1
    pruned = np.where(pruned_first, first, second)
    return pruned, ratio * np.where(pruned_first, second, first)


def mixed(draw: np.random.Generator, blocks: int, ratio: float) -> Pairs:
    """Half of the blocks are of small images, for which pruning does nothing; the true ratio is
    that of the whole corpus all the same."""
    small = draw.random(blocks) < 0.5
    size = np.where(small, 0.3, 1.0) * np.exp(0.1 * draw.standard_normal(blocks))
    large = (ratio * (0.5 + 0.15) - 0.15) / 0.5
    return size, size * np.where(small, 1.0, large)


WORLDS: list[Callable[[np.random.Generator, int, float], Pairs]] = [steady, skewed, drifting, mixed]


def interval(pairs: Pairs, confidence: float = 0.95) -> tuple[float, float]:
    blocks = [
        Block(round(pruned * NANO), round(dense * NANO), 32)
        for pruned, dense in zip(*pairs, strict=True)
    ]
    found = measured_ratio(blocks, confidence=confidence)
    assert found is not None
    return found.low or 0.0, found.high or math.inf


@pytest.mark.parametrize("blocks", [5, 10, 30])
@pytest.mark.parametrize("world", WORLDS)
def test_nineteen_of_twenty_intervals_hold_the_true_ratio(
    world: Callable[[np.random.Generator, int, float], Pairs], blocks: int
) -> None:
    draw = np.random.default_rng(blocks)
    intervals = [interval(world(draw, blocks, RATIO)) for _ in range(RUNS)]
    held = sum(low <= RATIO <= high for low, high in intervals) / RUNS
    assert 0.92 <= held <= 0.98  # 95 %, and three standard errors of the simulation


@pytest.mark.parametrize("world", WORLDS)
def test_pruning_that_saves_nothing_is_hardly_ever_called_faster(
    world: Callable[[np.random.Generator, int, float], Pairs],
) -> None:
    """Six sizes and loads of an endpoint, decided together from five blocks each."""
    draw, cells = np.random.default_rng(0), 6
    confidence = 1 - 0.05 / cells
    wrong = sum(
        any(interval(world(draw, 5, 1.0), confidence)[0] > 1 for _ in range(cells))
        for _ in range(RUNS)
    )
    assert wrong / RUNS <= 0.025 + 3 * (0.025 / RUNS) ** 0.5


def slow_machine(draw: np.random.Generator) -> Pace:
    """A machine whose speed changes by up to 20 % in the course of minutes, and by 5 % within one
    second: neighbours come and go."""
    phases = draw.uniform(0, 2 * math.pi, 3)
    waves = list(zip((180.0, 47.0, 1.3), (0.12, 0.08, 0.05), phases, strict=True))
    return lambda now: (
        1
        + sum(size * math.sin(2 * math.pi * now / period + phase) for period, size, phase in waves)
    )


def test_the_interval_of_a_run_holds_what_separate_runs_take() -> None:
    """200 simulated runs with ten blocks each, on a machine whose speed changes, of rows of 4 to 28
    tokens; against the same corpus at one speed, dense and pruned, without anything measured."""
    slots, costs = 8, {"pruned": 0.02, "dense": 0.12}
    held, off = 0, list[float]()
    for seed in range(200):
        draw = np.random.default_rng(seed)
        lengths = [int(tokens) for tokens in draw.integers(4, 29, 1_500)]
        runs = {
            arm: max(answer_rows(lengths, prefill=cost, step=0.02, slots=slots))
            for arm, cost in costs.items()
        }
        separate = runs["dense"] / runs["pruned"]
        pace, now, blocks = slow_machine(draw), 0.0, []
        for number in draw.permutation(10):
            rows = BLOCK_SLOTS * slots
            block = lengths[150 * number : 150 * number + rows]
            steady = {}
            for arm in sorted(costs, reverse=bool(number % 2)):
                times = answer_rows(
                    block, prefill=costs[arm], step=0.02, slots=slots, began=now + 0.3, pace=pace
                )
                ended = {f"r{row}": time for row, time in enumerate(times)}
                steady[arm] = steady_seconds(ended, began=now, slots=slots).values()
                now = max(times)
            blocks += Block.at_pace(steady["pruned"], steady["dense"], rows=rows, device="")
            now += draw.uniform(5, 60)
        found = measured_ratio(blocks)
        assert found is not None
        held += (found.low or 0.0) <= separate <= (found.high or math.inf)
        off.append(found.ratio / separate - 1)
    assert held / 200 >= 0.93
    assert abs(np.mean(off)) < 0.01, "no bias"
    assert np.quantile(np.abs(off), 0.95) < 0.1
