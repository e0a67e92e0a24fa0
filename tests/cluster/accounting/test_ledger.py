"""The ledger: what is summed, and sums that do not depend on order or grouping."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.accounting.ledger import RunLedger, UnitLedger, unit_ledger
from cluster.accounting.speedup import Block
from cluster.report.terminal import format_saving
from cluster.schema import OUTPUT_FIELDS
from sppruner.cost import RowCost

COST = RowCost(
    flops={"vision": 10, "pruner": 3, "prefill": 20},
    flops_dense={"vision": 10, "prefill": 90},
    kv_bytes=5,
    kv_bytes_dense=20,
)
SLOWER = [(40, 10), (40, 11), (40, 12), (41, 10), (41, 11)]
NAMES = st.sampled_from(["vision", "prefill", "decode"])
NUMBERS = st.integers(0, 2**50)
LEDGERS = st.builds(
    UnitLedger,
    rows=NUMBERS,
    failed=st.dictionaries(NAMES, NUMBERS),
    attempts=NUMBERS,
    visual_tokens=NUMBERS,
    visual_tokens_kept=NUMBERS,
    nanoseconds=NUMBERS,
    flops=st.dictionaries(NAMES, NUMBERS),
    flops_dense=st.dictionaries(NAMES, NUMBERS),
    kv_bytes=NUMBERS,
    blocks=st.lists(
        st.builds(
            Block,
            st.integers(1, 10**12),
            st.integers(1, 10**12),
            st.integers(1, 512),
            st.sampled_from(["", "cpu", "gpu"]),
        )
    ).map(tuple),
    nanoseconds_by_device=st.dictionaries(st.sampled_from(["cpu", "gpu"]), NUMBERS),
    control_nanoseconds=NUMBERS,
    agreements=NUMBERS,
    ordinary_rows=st.dictionaries(st.sampled_from(["cpu", "gpu"]), NUMBERS),
    steady_flops=NUMBERS,
)


def output_row(**values: Any) -> dict[str, Any]:
    columns = {
        "text": "a cat",
        "attempts": 1,
        "visual_tokens": 576,
        "visual_tokens_kept": 128,
        "prompt_tokens": 150,
        "completion_tokens": 12,
        "seconds": 0.25,
        "is_control": False,
        **COST.to_dict(),
    }
    return columns | values


def failed_row(code: str, **values: Any) -> dict[str, Any]:
    return {"error_code": code, "attempts": 0, "is_control": False, **values}


def output_table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=pa.schema(OUTPUT_FIELDS))


def test_rows_are_counted_by_outcome_and_only_successful_rows_are_summed() -> None:
    ledger = unit_ledger(
        output_table(
            output_row(),
            output_row(attempts=3),
            failed_row("image_missing"),
            failed_row("inference_failed", attempts=4, seconds=9.0, visual_tokens=576),
        )
    )
    assert ledger.rows == 4
    assert ledger.failed == {"image_missing": 1, "inference_failed": 1}
    assert ledger.rows_failed == 2
    assert (ledger.attempts, ledger.recomputed) == (8, 2)
    assert (ledger.visual_tokens, ledger.visual_tokens_kept) == (1152, 256)
    assert (ledger.prompt_tokens, ledger.completion_tokens) == (300, 24)
    assert ledger.seconds == pytest.approx(0.5)
    assert ledger.flops == {"vision": 20, "pruner": 6, "prefill": 40}
    assert (ledger.kv_bytes, ledger.kv_bytes_dense) == (10, 40)
    assert sum(ledger.flops_dense.values()) == 2 * 100


def test_what_measuring_and_asking_again_cost_is_beside_the_rows_seconds() -> None:
    """A block's seconds are its rows times the pace of either arm's steady part."""
    control = {"is_control": True, "control_seconds": 0.75, "device": "H200"}
    steady = {"steady_seconds": 0.375, "control_steady_seconds": 0.5}
    ledger = unit_ledger(
        output_table(
            output_row(control_text="a cat", steady_seconds=0.125, **control),
            output_row(control_text="a dog", discarded_seconds=0.5, **control, **steady),
            output_row(discarded_seconds=0.125, attempts=2, device="H200"),
            failed_row("inference_failed", **control | {"discarded_seconds": 0.25}),
        )
    )
    assert ledger.seconds == pytest.approx(0.75)
    assert ledger.blocks == (Block(500_000_000, 1_000_000_000, 2, "H200"),)
    assert ledger.control_seconds == pytest.approx(1.5 + 0.5 + 0.25), "a failed row's share too"
    assert ledger.retry_seconds == pytest.approx(0.125)
    assert (ledger.control_rows, ledger.agreements, ledger.blocks_spoiled) == (2, 1, 0)
    assert ledger.nanoseconds_by_device == {"H200": 750_000_000}
    assert ledger.ordinary_rows == {"H200": 1}
    assert ledger.ordinary_nanoseconds == {"H200": 250_000_000}


def test_a_block_without_dense_answers_is_spoiled_and_its_cost_counts() -> None:
    rows = [output_row(is_control=True, discarded_seconds=0.25) for _ in range(4)]
    ledger = unit_ledger(output_table(*rows, output_row()))
    assert (ledger.blocks, ledger.blocks_spoiled, ledger.control_rows) == ((), 1, 0)
    assert ledger.control_seconds == pytest.approx(1.0)


def test_rows_that_caches_served_are_counted() -> None:
    ledger = unit_ledger(
        output_table(
            output_row(flops_cached={"vision": 10}),
            output_row(flops_cached={"vision": 10, "pruner": 3, "prefill": 15}),
            output_row(flops_cached={}),
        )
    )
    assert ledger.flops_cached == {"vision": 20, "pruner": 3, "prefill": 15}
    assert (ledger.images_cached, ledger.prefixes_cached) == (2, 1)
    assert ledger.flops["prefill"] == 60, "as if there were no caches"


def test_what_caches_spared_in_the_steady_parts_is_apart() -> None:
    control = {"is_control": True, "control_seconds": 0.75, "control_text": "a cat"}
    ledger = unit_ledger(
        output_table(
            output_row(steady_seconds=0.1, flops_cached={"vision": 10}, **control),
            output_row(control_steady_seconds=0.1, flops_cached={"vision": 10}, **control),
            output_row(flops_cached={"vision": 10}),
        )
    )
    assert ledger.steady_flops == sum(COST.flops.values())
    assert ledger.steady_flops_cached == 10


def test_a_ledger_of_schema_version_2_has_its_batches_as_blocks() -> None:
    """Rows of one batch had equal seconds, since these were those of the batch shared out."""
    old = {"rows": 7, "control_pairs": [[40, 100]] * 4 + [[50, 110]] * 2, "agreements": 5}
    ledger = UnitLedger.from_json(json.dumps(old))
    assert sorted(ledger.blocks) == [Block(100, 220, 2), Block(160, 400, 4)]
    assert (ledger.control_rows, ledger.control_nanoseconds) == (6, 620)


def test_negative_savings_are_reported_as_negative() -> None:
    cost = RowCost(flops={"pruner": 9}, flops_dense={"prefill": 2}, kv_bytes=0, kv_bytes_dense=0)
    ledger = unit_ledger(output_table(output_row(**cost.to_dict())))
    assert (ledger.flops, ledger.flops_dense) == ({"pruner": 9}, {"prefill": 2})
    saved = format_saving(sum(ledger.flops_dense.values()), sum(ledger.flops.values()))
    assert saved == "-350.0 %"
    slower = UnitLedger(blocks=tuple(Block(p, d, 8) for p, d in SLOWER))
    ratio = RunLedger.of([slower]).measured_ratio()
    assert ratio is not None
    assert ratio.high is not None
    assert ratio.ratio < ratio.high < 1


@settings(deadline=None)
@given(LEDGERS)
def test_a_ledger_round_trips_through_json(ledger: UnitLedger) -> None:
    assert UnitLedger.from_json(ledger.to_json()) == ledger


@settings(deadline=None)
@given(LEDGERS, LEDGERS, LEDGERS)
def test_sums_do_not_depend_on_grouping(a: UnitLedger, b: UnitLedger, c: UnitLedger) -> None:
    assert (a + b) + c == a + (b + c)
    assert RunLedger.of([a, b, c]) == RunLedger.of([a]) + RunLedger.of([b, c])
    assert RunLedger.of([a, b, c]).units == 3


@settings(max_examples=15, deadline=None)
@given(st.lists(LEDGERS, max_size=4))
def test_the_measured_ratio_does_not_depend_on_commit_order(ledgers: list[UnitLedger]) -> None:
    assert RunLedger.of(ledgers).measured_ratio() == RunLedger.of(ledgers[::-1]).measured_ratio()


def test_the_sum_of_no_ledgers_is_empty() -> None:
    assert RunLedger.of([]).total == UnitLedger()
    assert RunLedger.of([]).measured_ratio() is None
