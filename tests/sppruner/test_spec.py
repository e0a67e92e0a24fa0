"""A spec compares with specs only, and a budget's edge cases mean what their errors say."""

from __future__ import annotations

from unittest.mock import ANY

import pytest

from sppruner.errors import SpecError
from sppruner.spec import DENSE, Budget, PruneSpec, parse_value, shares


def test_a_spec_equals_no_other_kind_of_value_and_leaves_the_comparison_to_it() -> None:
    spec = PruneSpec(method="grid")
    assert spec != spec.to_dict()
    assert spec != spec.to_json()
    # An object that compares itself with anything gets to do so.
    assert spec == ANY


def test_shares_of_equal_remainders_go_to_earlier_images() -> None:
    assert shares(7, [10, 10, 10]) == [3, 2, 2]
    assert shares(8, [10, 10, 10]) == [3, 3, 2]
    assert shares(30, [10, 10, 10]) == shares(99, [10, 10, 10]) == [10, 10, 10]


def test_a_budget_of_the_prompt_is_shared_and_one_of_the_image_is_not() -> None:
    sizes = [100, 300]
    assert Budget(tokens=40).per_image(sizes) == [40, 40]
    assert Budget(tokens=40, scope="prompt").per_image(sizes) == [10, 30]


def test_bounds_of_several_images_hold_one_rounding_each() -> None:
    """Three images may round up together, or be raised to `min_keep` together."""
    assert Budget(ratio=0.5).bounds(9, images=3) == (3, 8)
    assert Budget(ratio=0.01, min_keep=4).bounds(300, images=3) == (1, 15)
    assert Budget(tokens=5).bounds(30, images=3) == (5, 15)
    assert Budget(tokens=5, scope="prompt").bounds(30, images=3) == (5, 5)
    assert Budget(tokens=8, spread=0.5).bounds(30) == (4, 12)


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("false", False), ("3", 3), ("-1", -1), ("0.5", 0.5), ("1e-3", 0.001),
     ("clip", "clip"), ("True", "True"), ("", "")],
)  # fmt: skip
def test_a_value_on_a_command_line_has_the_type_it_looks_like(
    text: str, value: bool | int | float | str
) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_none_takes_no_budget_on_a_command_line_but_is_refused_one_in_a_spec() -> None:
    """A sweep over methods and budgets meets "none" with every budget; it runs once, dense."""
    half = Budget(ratio=0.5)
    assert PruneSpec.parse(" none ", half) is not DENSE
    assert PruneSpec.parse(" none ", half) == DENSE
    with pytest.raises(SpecError, match="keeps every token"):
        PruneSpec(method="none", budget=half)
