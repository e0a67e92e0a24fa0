"""Checks before a commit: complete units only, and rows whose pruning claims hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import CommitRefused
from cluster.output.checks import check_complete, check_pruning_claims
from sppruner.selectors import available, selector_for
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.cluster.labelled_tables import EXPECTED, SPEC, mask, row, table


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0), row(1)], "2 rows"),
        ([row(0), row(1), row(1)], "2 of them different"),
        ([row(0), row(1), row(2), row(3)], "4 rows"),
        ([row(0), row(1), row(3)], "exactly its 3 planned rows"),
        ([row(0), row(1), row(None)], "exactly its 3 planned rows"),  # type: ignore[arg-type]
        ([row(0), row(1), row(2, unit_id="other")], "in one commit"),
        ([row(0), row(1), row(2, _in_unit_rows=4)], "rows of plans"),
        ([row(0), row(1), row(2, _in_unit_rows=None)], "rows of plans"),
        ([row(0), row(1), row(2, run_id="stale")], "other runs"),
    ],
)
def test_only_complete_units_of_this_run_pass(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(CommitRefused, match=message):
        check_complete(table(*rows), EXPECTED)


TOKEN_COLUMNS = ("visual_tokens", "visual_tokens_kept", "kept_tokens")
DENSE_ROW = {"prune_method": "none", "prune_spec": DENSE.to_json()}
FASTV = PruneSpec(method="fastv", budget=SPEC.budget)
FASTV_ROW = {"prune_method": "fastv", "prune_spec": FASTV.to_json()}
TWO_STAGES = PruneSpec.parse("sppruner:mode=pre+mid", SPEC.budget)
TWO_STAGES_ROW = {"prune_spec": TWO_STAGES.to_json()}
UNKNOWN = PruneSpec(method="gone", budget=SPEC.budget)
UNKNOWN_ROW = {"prune_method": "gone", "prune_spec": UNKNOWN.to_json()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"visual_tokens_kept": 100}, "kept 100 of 100 .* keeps 25"),
        ({"visual_tokens_kept": 24}, "keeps 25"),
        ({"visual_tokens_kept": None}, "does not say"),
        ({"prune_spec": None}, "does not say"),
        ({"prune_spec": "{}"}, "not a prune spec"),
        ({"prune_spec": "{broken"}, "row 1"),
        ({"prune_method": "fsr"}, "names method fsr beside sppruner"),
        ({"text": None}, "neither a text nor an error"),
        (DENSE_ROW, "kept 25 of 100 .* keeps 100"),
        ({"kept_tokens": None}, "row 1 does not say"),
        ({"kept_tokens": mask(24, 100)}, "row 1 kept 25 .* and 24 by its kept_tokens"),
        ({"kept_tokens": mask(26, 100)}, "and 26 by"),
        ({"kept_tokens": mask(25, 96)}, "12 bytes of kept_tokens do not fit 100"),
        ({"kept_tokens": mask(25, 100) + b"\0"}, "14 bytes of kept_tokens do not fit 100"),
        ({"kept_tokens": mask(25, 104)}, "do not fit 100"),
        (DENSE_ROW | {"visual_tokens_kept": 100}, "kept 100 .* and 25 by"),
        (FASTV_ROW | {"kept_tokens": mask(24, 100)}, "and 24 by"),
        (FASTV_ROW | {"kept_tokens": mask(26, 100)}, "and 26 by .* lets 100 of 100 enter"),
        (
            TWO_STAGES_ROW | {"kept_tokens": mask(24, 100)},
            "and 24 by .* lets 25 to 37 of 100 enter",
        ),
        (UNKNOWN_ROW | {"kept_tokens": mask(40, 100)}, "row 1: no pruning method 'gone'"),
    ],
)
def test_rows_whose_pruning_claims_do_not_hold_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(CommitRefused, match=message):
        check_pruning_claims(table(row(0), row(1, **values), row(2)), "unit")


def test_error_rows_and_dense_rows_pass() -> None:
    error = {name: None for name in ("text", *TOKEN_COLUMNS, "prune_method", "prune_spec")}
    failed = row(0, error_code="image_missing", error_stage="decode", **error)
    dense = row(1, visual_tokens_kept=100, kept_tokens=mask(100, 100), **DENSE_ROW)
    check_pruning_claims(table(failed, dense, row(2)), "unit")


ALL_SPECS = [*(PruneSpec.parse(method, SPEC.budget) for method in available()), TWO_STAGES]


def claims(spec: PruneSpec, n: int, layers: int) -> dict[str, Any]:
    """The claims of a row with `n` visual tokens, correctly pruned in a decoder with `layers`
    layers."""
    kept, selector = spec.budget.count(n), selector_for(spec)
    entered = n if selector is None else selector.schedule(n, kept, layers).before
    method = {"prune_method": spec.method, "prune_spec": spec.to_json()}
    counts = {"visual_tokens": n, "visual_tokens_kept": kept}
    return method | counts | {"kept_tokens": mask(entered, n)}


def passes(values: dict[str, Any]) -> bool:
    try:
        check_pruning_claims(table(row(0, **values)), "unit")
    except CommitRefused:
        return False
    return True


@pytest.mark.parametrize("spec", ALL_SPECS, ids=[*available(), "pre+mid"])
def test_the_tokens_that_may_enter_are_those_that_some_decoder_depth_lets_in(
    spec: PruneSpec,
) -> None:
    rows = [claims(spec, 100, layers) for layers in range(3, 81)]
    entered = [int.from_bytes(values["kept_tokens"], "little").bit_count() for values in rows]
    others = [rows[0] | {"kept_tokens": mask(number, 100)} for number in range(101)]
    passing = [number for number, values in enumerate(others) if passes(values)]
    # A mask that agrees with the count passes without a look at the method.
    agreeing = rows[0]["visual_tokens_kept"]
    assert passing == sorted({agreeing, *range(min(entered), max(entered) + 1)})


@given(
    spec=st.sampled_from(ALL_SPECS),
    n=st.integers(1, 1_000),
    ratio=st.floats(0.001, 1.0),
    layers=st.integers(3, 80),
)
@settings(max_examples=200, deadline=None)
def test_a_correctly_pruned_row_of_any_method_passes(
    spec: PruneSpec, n: int, ratio: float, layers: int
) -> None:
    if not spec.is_dense:
        spec = replace(spec, budget=Budget(ratio=ratio))
    check_pruning_claims(table(row(0, **claims(spec, n, layers))), "unit")


@given(n=st.integers(0, 4_000), ratio=st.floats(0.001, 1.0), off=st.integers(-2, 2))
@settings(max_examples=50, deadline=None)
def test_only_the_exact_count_of_the_budget_passes(n: int, ratio: float, off: int) -> None:
    spec = PruneSpec(method="sppruner", budget=Budget(ratio=ratio))
    kept = spec.budget.count(n) + off
    values = {"visual_tokens": n, "visual_tokens_kept": kept, "prune_spec": spec.to_json()}
    values["kept_tokens"] = mask(kept, n)
    rows = table(row(0, **values), row(1), row(2))
    if off == 0:
        check_pruning_claims(rows, "unit")
    else:
        with pytest.raises(CommitRefused):
            check_pruning_claims(rows, "unit")
