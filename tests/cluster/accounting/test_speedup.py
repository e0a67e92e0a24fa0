"""The measured ratio: each block is one observation, few give no interval, kinds of device are
strata."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.accounting.speedup import Block, measured_ratio


def blocks(*pairs: tuple[int, int], device: str = "") -> list[Block]:
    return [Block(pruned, dense, 8, device) for pruned, dense in pairs]


def test_the_measured_ratio_weights_blocks_by_their_seconds() -> None:
    ratio = measured_ratio(blocks((1_000, 3_000), (3_000, 5_000)))
    assert ratio is not None
    assert ratio.ratio == pytest.approx(2.0)
    assert (ratio.rows, ratio.blocks, ratio.half_width) == (16, 2, None)


def test_the_interval_is_student_s_t_over_blocks_of_equal_weight() -> None:
    """By hand: differences of shares -0.1, 0.1, -0.2, 0.2 and 0, each divided by 0.8; the sum of
    their squares is 0.15625, and t is 2.776 with four degrees of freedom."""
    dense = [100, 300, 0, 400, 200]
    found = measured_ratio(blocks(*((200, n + 1) for n in dense)))
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert math.log(found.high / found.ratio) == pytest.approx(2.776 * 0.15625**0.5, rel=0.02)
    assert found.ratio / found.low == pytest.approx(found.high / found.ratio)
    assert found.half_width == pytest.approx(math.log(found.high / found.ratio))


def test_blocks_that_say_nothing_give_no_interval() -> None:
    found = measured_ratio(blocks((1, 1), (1, 2), (1, 3), (1, 4), (247, 1)))
    assert found is not None
    assert found.low is found.high is None


def test_blocks_without_any_spread_give_an_interval_of_no_width() -> None:
    found = measured_ratio(blocks(*[(10, 20)] * 5))
    assert found is not None
    assert (found.low, found.ratio, found.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("count", [1, 4])
def test_few_blocks_give_a_ratio_but_no_interval(count: int) -> None:
    ratio = measured_ratio(blocks(*((n, 2 * n) for n in range(1, count + 1))))
    assert ratio is not None
    assert (ratio.ratio, ratio.low, ratio.high) == (2.0, None, None)
    assert (ratio.rows, ratio.blocks) == (8 * count, count)


@pytest.mark.parametrize("pairs", [(), ((0, 5), (0, 7))])
def test_blocks_without_pruned_seconds_give_no_ratio(pairs: tuple[tuple[int, int], ...]) -> None:
    assert measured_ratio(blocks(*pairs)) is None


FAST = blocks(*((100, 150 + n % 3) for n in range(6)), device="fast")
SLOW = blocks(*((400, 1200 + n % 5) for n in range(6)), device="slow")


def test_kinds_of_device_count_by_the_seconds_that_the_rows_spent_on_them() -> None:
    """Half of the blocks met the slow kind, which had a tenth of the run's seconds."""
    found = measured_ratio([*FAST, *SLOW], seconds={"fast": 90.0, "slow": 10.0})
    assert found is not None
    expected = 0.9 * 151 / 100 + 0.1 * sum(1200 + n % 5 for n in range(6)) / 2400
    assert found.ratio == pytest.approx(expected)
    together = measured_ratio([*FAST, *SLOW])
    assert together is not None
    assert together.ratio > 2.5, "as if the run had spent four of five seconds on the slow kind"
    assert (found.half_width or 1) < (together.half_width or 0)


def test_a_kind_with_too_few_blocks_makes_no_stratum() -> None:
    few = [*FAST, *SLOW[:4]]
    assert measured_ratio(few, seconds={"fast": 9.0, "slow": 1.0}) == measured_ratio(few)
    unseen = measured_ratio(FAST, seconds={"fast": 9.0, "slow": 1.0})
    assert unseen == measured_ratio(FAST)
    alone = measured_ratio(FAST, seconds={"fast": 9.0, "slow": 0.0})
    assert alone == measured_ratio(FAST)


def test_intervals_over_strata_hold_the_true_ratio() -> None:
    draw = np.random.default_rng(1)
    true = 0.7 * 1.5 + 0.3 * 3.0
    held = 0
    for _ in range(1_000):
        made = []
        for device, ratio in (("fast", 1.5), ("slow", 3.0)):
            pruned, dense = np.exp(0.15 * draw.standard_normal((2, 6))) * 1e9
            made += blocks(
                *((int(p), int(ratio * d)) for p, d in zip(pruned, dense, strict=True)),
                device=device,
            )
        found = measured_ratio(made, seconds={"fast": 70.0, "slow": 30.0})
        assert found is not None
        held += (found.low or 0) <= true <= (found.high or math.inf)
    assert 0.925 <= held / 1_000 <= 0.975
