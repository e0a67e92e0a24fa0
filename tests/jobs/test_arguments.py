"""Methods, options and budgets of a command line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.arguments import combine_specs, parse_methods, parse_shares
from sppruner.errors import SpecError
from sppruner.evaluation import method_label
from sppruner.spec import parse_value


def test_options_follow_a_method_after_colons() -> None:
    plain, optioned, random_method = parse_methods(
        "sppruner, sppruner:kappa=0:root=false,random:seed=7"
    )
    assert plain.options == {}
    assert optioned.options == {"kappa": 0, "root": False}
    assert (random_method.method, random_method.options) == ("random", {"seed": 7})


def test_dense_is_dropped_because_it_always_runs() -> None:
    assert [spec.method for spec in parse_methods("none,grid,")] == ["grid"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spruner", "there are none"),
        ("sppruner:kapa=1", "kappa"),
        ("sppruner:kappa", "sppruner:option=value"),
        ("sppruner:kappa=", "sppruner:option=value"),
        ("sppruner:kappa=much", "not a float"),
    ],
)
def test_a_bad_method_or_option_is_named(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_methods(text)


@given(st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_values_are_parsed_as_labels_format_them(value: bool | int | float) -> None:
    (written,) = method_label("m", {"o": value}).split("=")[1:]
    read = parse_value(written)
    assert read == value
    assert type(read) is type(value)


def test_methods_and_budgets_are_combined_without_duplicates() -> None:
    specs = combine_specs(parse_methods("grid,topk,grid"), parse_shares("0.5,0.25,0.5"))
    assert [(spec.method, spec.budget.ratio) for spec in specs] == [
        ("grid", 0.5),
        ("grid", 0.25),
        ("topk", 0.5),
        ("topk", 0.25),
    ]


def test_shares_are_numbers() -> None:
    with pytest.raises(SpecError, match="give shares such as"):
        parse_shares("0.3;0.2")
