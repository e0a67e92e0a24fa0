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
