"""Budgets count what the papers count; a spec survives JSON, hashing and pickling."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppruner.errors import SpecError
from sppruner.spec import DENSE, Budget, PruneSpec, shares

ratios = st.floats(min_value=0, max_value=1, exclude_min=True)
values = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
specs = st.builds(
    PruneSpec,
    method=st.sampled_from(["sppruner", "grid"]),
    budget=st.one_of(
        st.builds(Budget, ratio=ratios, min_keep=st.integers(0, 5)),
        st.builds(Budget, tokens=st.integers(0, 4096)),
    ),
    positions=st.sampled_from(["keep", "renumber"]),
    options=st.dictionaries(st.text(max_size=5), values, max_size=3),
)


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [(0.333, 192), (0.222, 128), (0.111, 64), (1 / 3, 192), (2 / 9, 128), (1 / 9, 64), (1, 576)],
)
def test_ratios_of_576_give_the_counts_of_the_papers(ratio: float, kept: int) -> None:
    assert Budget(ratio=ratio).count(576) == kept


@given(ratios, ratios, st.integers(0, 5000), st.integers(0, 50))
def test_a_count_stays_in_bounds_and_grows_with_ratio_and_image(
    one: float, other: float, n: int, min_keep: int
) -> None:
    low, high = (Budget(ratio=r, min_keep=min_keep) for r in sorted((one, other)))
    assert min(n, min_keep) <= low.count(n) <= high.count(n) <= n
    assert low.count(n) <= low.count(n + 1)
    assert Budget(ratio=1.0).count(n) == n


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_a_token_budget_is_met_or_the_whole_image_is_kept(tokens: int, n: int) -> None:
    assert Budget(tokens=tokens).count(n) == min(tokens, n)


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"ratio": 0.5, "tokens": 3},
        {"ratio": 0.0},
        {"ratio": 1.01},
        {"ratio": float("nan")},
        {"ratio": "half"},
        {"ratio": True},
        {"tokens": -1},
        {"tokens": 2.5},
        {"tokens": True},
        {"ratio": 0.5, "min_keep": -1},
        {"ratio": 0.5, "min_keep": 1.5},
        {"ratio": 0.5, "min_keep": None},
        {"ratio": 10**400},
        {"tokens": 10**400},
        {"ratio": 0.5, "scope": "batch"},
        {"ratio": 0.5, "spread": 1.0},
        {"ratio": 0.5, "spread": -0.1},
    ],
)
def test_an_invalid_budget_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        Budget(**bad)


@given(specs)
def test_a_spec_survives_its_dictionary_and_its_pickle(spec: PruneSpec) -> None:
    for copy in (PruneSpec.from_dict(spec.to_dict()), pickle.loads(pickle.dumps(spec))):
        assert copy == spec
        assert hash(copy) == hash(spec)
        assert copy.to_json() == spec.to_json()


@given(specs, specs)
def test_specs_are_equal_exactly_when_their_json_is(a: PruneSpec, b: PruneSpec) -> None:
    assert (a == b) == (a.to_json() == b.to_json())
    assert a != b or hash(a) == hash(b)


def test_numbers_equal_in_a_dict_but_not_in_json_do_not_break_the_hash() -> None:
    whole = PruneSpec(method="grid", budget=Budget(ratio=1), options={"mu": 1})
    for other in (1.0, True):
        spec = PruneSpec(method="grid", options={"mu": other})
        assert spec != whole, "equal specs must hash alike, and the JSON of these differs"
    assert whole == PruneSpec(method="grid", budget=Budget(ratio=1.0), options={"mu": 1})


def test_option_order_does_not_matter_and_the_callers_mapping_is_copied() -> None:
    options = {"mu": 0.1, "eta": 0.5}
    spec = PruneSpec(method="sppruner", options=options)
    assert spec == PruneSpec(method="sppruner", options=dict(reversed(options.items())))
    before = spec.to_json()
    options["mu"] = 0.9
    assert spec.to_json() == before


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"method": "grid", "ratio": 0.5},
        {"method": 7},
        {"method": "grid", "budget": 0.5},
        {"method": "grid", "budget": {"share": 0.5}},
        {"method": "grid", "budget": {"ratio": "0.5"}},
        {"method": "grid", "positions": "shift"},
        {"method": "grid", "options": [1]},
        {"method": "grid", "options": {"a": [1]}},
        {"method": "grid", "options": {"a": float("inf")}},
        {"method": "none", "budget": {"ratio": 0.5}},
    ],
)
def test_an_invalid_dictionary_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        PruneSpec.from_dict(bad)


def test_dense_is_the_spec_of_method_none() -> None:
    assert PruneSpec.from_dict({"method": "none"}) == DENSE
    assert DENSE.is_dense
    assert not PruneSpec(method="grid").is_dense


sizes_of_images = st.lists(st.integers(0, 3000), min_size=1, max_size=6)


@given(st.integers(0, 20_000), sizes_of_images)
def test_shares_sum_to_the_total_and_follow_the_sizes(total: int, sizes: list[int]) -> None:
    parts = shares(total, sizes)
    assert sum(parts) == min(total, sum(sizes))
    assert all(0 <= part <= size for part, size in zip(parts, sizes, strict=True))
    if total < sum(sizes):
        exact = [total * size / sum(sizes) for size in sizes]
        assert all(abs(part - due) < 1 for part, due in zip(parts, exact, strict=True))


@given(sizes_of_images, ratios, st.integers(0, 500), st.sampled_from(["image", "prompt"]))
def test_a_prompt_keeps_a_number_of_tokens_within_its_budgets_bounds(
    sizes: list[int], ratio: float, tokens: int, scope: Any
) -> None:
    for budget in (Budget(ratio=ratio, scope=scope), Budget(tokens=tokens, scope=scope)):
        kept = budget.per_image(sizes)
        low, high = budget.bounds(sum(sizes), len(sizes))
        assert low <= sum(kept) <= high
        if scope == "prompt" or len(sizes) == 1:
            assert low == high == budget.count(sum(sizes))


@given(st.integers(0, 1000), st.integers(0, 500), st.floats(0, 10), st.floats(0, 0.99))
def test_information_changes_a_budget_by_at_most_its_spread(
    n: int, tokens: int, weight: float, spread: float
) -> None:
    budget = Budget(tokens=tokens, spread=spread)
    k = budget.count(n)
    low, high = budget.bounds(n)
    assert low <= budget.reweighted(k, n, weight) <= high
    assert budget.reweighted(k, n, 1.0) == k


@given(
    sizes_of_images,
    st.one_of(st.builds(Budget, ratio=ratios), st.builds(Budget, tokens=st.integers(0, 500))),
    st.sampled_from(["image", "prompt"]),
    st.integers(0, 20),
    st.floats(0, 0.99),
    st.data(),
)
def test_what_a_prompt_keeps_by_information_is_within_the_bounds_that_are_reserved_for_it(
    sizes: list[int], budget: Budget, scope: Any, min_keep: int, spread: float, data: st.DataObject
) -> None:
    """An engine reserves slots by these bounds: one token more ends other people's requests."""
    budget = replace(budget, scope=scope, min_keep=min_keep, spread=spread)
    low, high = budget.bounds(sum(sizes), len(sizes))
    kept = []
    for k, n in zip(budget.per_image(sizes), sizes, strict=True):
        kept.append(budget.reweighted(k, n, data.draw(st.floats(0, 10))))
        assert min(k, min_keep) <= kept[-1] <= n
    assert low <= sum(kept) <= high


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "grid",
        ["method"],
        {"method": "grid", 1: 2, "a": 3},
        {"method": "grid", "options": {1: 2, "a": 3}},
        {"method": "grid", "options": {"a": 10**5000}},
        {"method": "grid", "budget": None},
        {"method": "none", "options": {"foo": 1}},
    ],
)
def test_what_is_no_spec_is_a_spec_error(bad: Any) -> None:
    with pytest.raises(SpecError):
        PruneSpec.from_dict(bad)


def test_a_budgets_json_includes_scope_and_spread_only_when_set() -> None:
    plain = PruneSpec(method="grid", budget=Budget(ratio=0.5)).to_dict()["budget"]
    assert plain == {"ratio": 0.5, "min_keep": 1}
    shared = PruneSpec(method="grid", budget=Budget(tokens=9, scope="prompt", spread=0.5))
    assert shared.to_dict()["budget"]["scope"] == "prompt"
    assert PruneSpec.from_dict(shared.to_dict()) == shared


def test_a_method_and_its_options_parse_from_a_command_line() -> None:
    half = Budget(ratio=0.5)
    assert PruneSpec.parse("grid", half) == PruneSpec(method="grid", budget=half)
    spec = PruneSpec.parse("sppruner:relevance=none:kappa=0:mu=0.25:restore_norm=false", half)
    assert spec.options == {"relevance": "none", "kappa": 0, "mu": 0.25, "restore_norm": False}
    assert PruneSpec.parse("none", half) == DENSE


@pytest.mark.parametrize("text", ["grid:", "grid:seed", "grid:seed=", "grid:=3"])
def test_an_option_without_a_value_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="option=value"):
        PruneSpec.parse(text, Budget(ratio=0.5))
