"""Schedules of the methods that prune inside the decoder: what their budgets mean, layer by layer,
and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppruner import Budget, PruneSpec
from sppruner.adapters import capabilities
from sppruner.errors import SpecError
from sppruner.pruner import check_spec
from sppruner.selectors import Selector, selector_for
from sppruner.selectors.pyramiddrop import PyramidDropSelector
from sppruner.stages import TokenSchedule
from tests.sppruner.families.llava import build

CAN = replace(capabilities(build().config), decoder_layers=32)


def selector(method: str, **options: Any) -> Selector:
    chosen = selector_for(PruneSpec(method=method, budget=Budget(ratio=0.5), options=options))
    assert chosen is not None
    return chosen


def check(method: str, budget: Budget, can: Any = CAN, **options: Any) -> None:
    check_spec(PruneSpec(method=method, budget=budget, options=options), can)


def average(schedule: TokenSchedule, layers: int) -> float:
    return sum(schedule.at(layer) for layer in range(layers)) / layers


def assert_falls(schedule: TokenSchedule, n: int, layers: int) -> None:
    tokens = [n, *(schedule.at(layer) for layer in range(layers))]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[-1] >= 0
    stages = [layer for layer, _ in schedule.stages]
    assert stages == sorted(set(stages))


sizes = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


def test_the_papers_settings() -> None:
    fastv = selector("fastv").schedule(576, 288, 32)
    assert fastv == TokenSchedule(before=576, counted=288, stages=((2, 288),))
    even = ((8, 288), (16, 144), (24, 72))
    pyramid = selector("pyramiddrop").schedule(576, 72, 32)
    assert pyramid == TokenSchedule(before=576, counted=72, stages=even, scoring="stage")
    assert selector("pyramiddrop", scoring="before").schedule(576, 72, 32).scoring == "before"
    assert fastv.scoring == "before"
    assert selector("pyramiddrop", count="average").schedule(576, 270, 32).stages == even
    two_steps = selector("sppruner", mode="pre+mid").schedule(576, 64, 32)
    assert two_steps == TokenSchedule(before=96, counted=64, stages=((16, 32),))


@given(sizes, st.integers(3, 80))
def test_a_final_budget_is_what_stays_after_the_last_stage(
    size: tuple[int, int], layers: int
) -> None:
    n, k = size
    for method in ("fastv", "pyramiddrop"):
        schedule = selector(method).schedule(n, k, layers)
        assert schedule.before == n
        assert schedule.at(layers - 1) == schedule.counted == k
        assert_falls(schedule, n, layers)


@given(st.integers(1, 3000), st.floats(0.01, 1.0), st.integers(3, 80))
def test_an_average_budget_is_the_mean_over_the_layers_to_the_nearest_token(
    n: int, ratio: float, layers: int
) -> None:
    budget = Budget(ratio=ratio)
    for method in ("fastv", "pyramiddrop"):
        chosen = selector(method, count="average")
        try:
            chosen.check(budget, replace(CAN, decoder_layers=layers))
        except SpecError:
            continue  # Not reachable; `check` raises an error.
        k = budget.count(n)
        schedule = chosen.schedule(n, k, layers)
        assert schedule.before == n
        assert schedule.counted == k
        assert_falls(schedule, n, layers)
        assert abs(average(schedule, layers) - k) <= 0.5


@given(sizes, st.integers(2, 80))
def test_pre_and_mid_average_to_the_budget_exactly(size: tuple[int, int], layers: int) -> None:
    n, k = size
    schedule = selector("sppruner", mode="pre+mid").schedule(n, k, layers)
    assert schedule.counted == k
    assert k <= schedule.before <= n
    assert_falls(schedule, n, layers)
    assert sum(schedule.at(layer) for layer in range(layers)) == layers * k
    if layers % 2 == 0 and 3 * k <= 2 * n:
        assert schedule.before == k + k // 2
        assert schedule.at(layers - 1) == k - k // 2


def test_every_token_stays_without_a_stage_where_the_budget_has_room() -> None:
    for method, options in (("fastv", {}), ("pyramiddrop", {}), ("sppruner", {"mode": "pre+mid"})):
        assert selector(method, **options).schedule(16, 16, 32).stages == ()


def test_pyramid_stages_are_at_the_quarters_or_at_the_given_layers() -> None:
    method = selector("pyramiddrop")
    assert method.stage_layers(32) == (8, 16, 24)  # type: ignore[attr-defined]
    assert method.stage_layers(28) == (7, 14, 21)  # type: ignore[attr-defined]
    assert method.stage_layers(3) == (1, 2)  # type: ignore[attr-defined]
    assert selector("pyramiddrop", layers="2, 6,15").schedule(64, 8, 32).stages == (
        (2, 32),
        (6, 16),
        (15, 8),
    )


def test_pyramid_counts_are_cut_to_whole_numbers() -> None:
    """As the code's `int(n * ratio)`; exact counts do not lose a token by rounding."""
    method = selector("pyramiddrop")
    share = (64 / 576) ** (1 / 3)
    assert [576 * share, 576 * share**2] == pytest.approx([276.91, 133.13], abs=0.01)
    assert method.schedule(576, 64, 32).stages == ((8, 276), (16, 133), (24, 64))
    share = (65 / 576) ** (1 / 3)
    assert [576 * share, 576 * share**2] == pytest.approx([278.35, 134.51], abs=0.01)
    assert method.schedule(576, 65, 32).stages == ((8, 278), (16, 134), (24, 65))
    assert method.schedule(343, 27, 32).stages == ((8, 147), (16, 63), (24, 27))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fastv", {"layer": 0}, "use 1 or more"),
        ("fastv", {"count": "mean"}, r"use one of \('final', 'average'\)"),
        ("pyramiddrop", {"layers": "8,4"}, "ascending"),
        ("pyramiddrop", {"layers": "0,4"}, "ascending"),
        ("pyramiddrop", {"layers": "8;16"}, "such as '8,16,24'"),
        ("pyramiddrop", {"scoring": "next"}, r"use one of \('before', 'stage'\)"),
        ("sppruner", {"mode": "mid"}, r"use one of \('pre', 'pre\+mid'\)"),
    ],
)
def test_the_error_for_an_invalid_option_says_what_to_write(
    method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        selector(method, **options)


def test_one_layer_can_be_written_on_a_command_line() -> None:
    spec = PruneSpec.parse("pyramiddrop:layers=8", Budget(ratio=0.5))
    chosen = selector_for(spec)
    assert isinstance(chosen, PyramidDropSelector)
    assert chosen.stage_layers(32) == (8,)


def test_layers_outside_the_decoder_or_before_its_first_stage_are_refused() -> None:
    half = Budget(ratio=0.5)
    late = replace(CAN, first_prunable_layer=3)
    check("fastv", half, late, layer=3)
    for options, can in (({"layer": 32}, CAN), ({}, late), ({"layer": 1}, late)):
        with pytest.raises(SpecError, match="allows layers"):
            check("fastv", half, can, **options)
    with pytest.raises(SpecError, match="allows layers 3 to 3"):
        check("pyramiddrop", half, replace(late, decoder_layers=4))
    with pytest.raises(SpecError, match="allows layers 3 to 3"):
        check("sppruner", half, replace(late, decoder_layers=4), mode="pre+mid", relevance="none")


def test_the_error_for_an_unreachable_average_names_a_reachable_one() -> None:
    check("fastv", Budget(ratio=0.0625), count="average")
    with pytest.raises(SpecError, match=r"at least 0\.0625, an earlier layer"):
        check("fastv", Budget(ratio=0.06), count="average")
    with pytest.raises(SpecError, match=r"pass 8 of 32 layers. Use a ratio of at least 0\.25"):
        check("pyramiddrop", Budget(ratio=64 / 576), count="average")
    with pytest.raises(SpecError, match="needs a budget ratio"):
        check("fastv", Budget(tokens=64), count="average")
