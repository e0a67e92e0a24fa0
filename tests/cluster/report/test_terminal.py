"""The terminal report: committed figures, losses as losses, and nothing unmeasured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.ledger import RunLedger, UnitLedger
from cluster.accounting.speedup import Block, MeasuredRatio
from cluster.output.accuracy import Accuracy
from cluster.output.summary import Attempt, Generation, Summary
from cluster.report.terminal import format_quantity, format_saving, render

TOTAL = UnitLedger(
    rows=100,
    failed={"image_undecodable": 3},
    attempts=110,
    recomputed=5,
    visual_tokens=1000,
    visual_tokens_kept=222,
    nanoseconds=10_000_000_000,
    flops={"vision": 100, "projector": 10, "pruner": 5, "prefill": 50, "decode": 10},
    flops_dense={"vision": 100, "projector": 10, "pruner": 0, "prefill": 200, "decode": 12},
    kv_bytes=500_000,
    kv_bytes_dense=2_000_000,
    blocks=(Block(100_000_000, 250_000_000, 1), Block(100_000_000, 150_000_000, 1)),
    control_nanoseconds=400_000_000,
    agreements=1,
)


def summary(**more: Any) -> Summary:
    values: dict[str, Any] = {
        "run_id": "abc",
        "created": "2026-01-01T00:00:00+00:00",
        "settings": {
            "schema_version": 5,
            "model": "m",
            "model_revision": "r1",
            "spec": {"method": "sppruner", "budget": {"ratio": 0.222}, "options": {}},
        },
        "input": "in",
        "output": "out",
        "units": 2,
        "units_done": 2,
        "rows_planned": 100,
        "unread_bytes": 0,
        "total": TOTAL,
        "measured": RunLedger(total=TOTAL).measured_ratio(),
        "duplicate_keys": 4,
        "accuracy": None,
    }
    return Summary(**(values | more))


def render_text(shown: Summary, note: str | None = None) -> str:
    console = Console(width=140, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(render(shown, note=note))
    return captured.get()


def test_the_report_shows_all_figures_of_a_run() -> None:
    attempt = Attempt(
        rows=60,
        wall_seconds=6.0,
        start_seconds=20.0,
        rows_per_second=10.0,
        replicas=2,
        replica_busy_share=0.75,
        events={"replica_died": 2, "store_waited": 9},
    )
    report = render_text(
        summary(attempt=attempt, accuracy=Accuracy(scored=80, mean=0.875)), "resumed"
    )
    for text in (
        "completed with errors (resumed)",
        "sppruner, keeps 22.2 %",
        "3  (image_undecodable 3)",
        "5 rows took more than one attempt",
        "4 rows share their key",
        "2 replicas died, store away for 9 s",
        "87.5 % of 80 rows",
        "10.0 rows/s on 2 replica(s)",
        "busy 75 %",
        "+77.8 %",  # visual tokens
        "+75.0 %",  # prefill
        "2.00 × on 2 rows in 2 control blocks",
        "10.00 s estimated from that ratio: not shown, it may be no saving",
        "1 of 2 control rows, same text",
    ):
        assert text in report, text


@pytest.mark.parametrize(
    ("failed", "hint"),
    [
        ({"read_failed": 1}, "python jobs/retry_errors.py out asks them again"),
        (
            {"prompt_invalid": 2},
            "they fail again, and python jobs/retry_errors.py out --codes prompt_invalid asks them",
        ),
        (
            {"prompt_invalid": 2, "read_failed": 1},
            "out asks them again (prompt_invalid only with --codes prompt_invalid)",
        ),
    ],
)
def test_the_command_that_is_named_asks_the_rows_that_failed(
    failed: dict[str, int], hint: str
) -> None:
    report = " ".join(render_text(summary(total=replace(TOTAL, failed=failed))).split())
    assert hint in report
    assert ("--codes" in report) == ("prompt_invalid" in failed)
    assert "retry_errors" not in render_text(summary(total=replace(TOTAL, failed={})))


def test_unread_bytes_are_shown_where_there_are_any() -> None:
    assert "unread" not in render_text(summary())
    assert "1,536 bytes of damaged archives" in render_text(summary(unread_bytes=1536))


def test_the_report_shows_what_was_mended_what_is_missing_and_what_is_not_ours() -> None:
    again = Generation(number=1, units=3, asked=9, mended=7)
    foreign = tuple(f"s3://b/{n}.parquet" for n in range(7))
    missing = {"accuracy": "TypeError: [odd]"}
    report = render_text(summary(generations=(again,), foreign=foreign, unavailable=missing))
    for text in (
        "9 failed rows of 3 units: 7 mended, 2 failed again",
        "not available: TypeError: [odd]",
        "7 objects in the output are none of this run",
        "s3://b/0.parquet",
    ):
        assert text in " ".join(report.split()), text


def test_a_negative_saving_is_printed_as_a_loss() -> None:
    slower = MeasuredRatio(ratio=0.8, low=0.7, high=0.9, rows=16, blocks=2)
    report = render_text(summary(measured=slower))
    assert "time lost" in report
    assert "2.00 s (1.00 – 3.00), estimated" in report
    assert "not shown" not in report
    assert "time saved" not in report
    assert format_saving(100, 125) == "-25.0 %"


def test_without_control_rows_no_time_saving_is_printed() -> None:
    report = render_text(summary(measured=None, total=replace(TOTAL, blocks=(), agreements=0)))
    assert "not measured: no control block is committed" in report
    assert "saved from" not in report
    assert "estimated" not in report
    assert "spent on control  0.40 s" in report, "it was spent all the same"


def test_a_saving_that_may_be_none_is_not_shown() -> None:
    close = MeasuredRatio(ratio=1.1, low=0.9, high=1.3, rows=320, blocks=5)
    report = render_text(summary(measured=close))
    assert "1.00 s (-1.00 – 3.00), estimated from that ratio: not shown" in report
    slower = MeasuredRatio(ratio=0.9, low=0.7, high=1.1, rows=320, blocks=5)
    assert "not shown, it may be no loss" in render_text(summary(measured=slower))


def test_a_saving_that_blocks_do_not_speak_for_is_not_known() -> None:
    total = replace(
        TOTAL, ordinary_rows={"": 90}, ordinary_nanoseconds={"": 90 * 10**9}, blocks_spoiled=1
    )
    shown = summary(total=total)
    report = " ".join(render_text(shown).split())
    assert "not known: the blocks do not speak for all rows" in report
    assert "10.0 times as long as those of full replicas" in report
    assert "1 control block was spoiled, no part of the ratio" in report
    assert "estimated" not in report
    console = Console(width=140)
    with console.capture() as captured:
        console.print(render(shown, price=3.0))
    assert "saved" not in captured.get().split("money")[1].split("dense / pruned")[0]


def test_what_a_decision_cost_is_shown_and_paid_for() -> None:
    decided = BreakEven.from_blocks([Block(10, 20, 8)] * 5, seconds=3600.0)
    console = Console(width=140)
    with console.capture() as captured:
        console.print(render(summary(break_even=decided, measured=None), price=2.0))
    report = captured.get()
    assert "spent on break-even  3600.00 s, before the run" in report
    assert "2 for measuring and retries" in report


def test_a_dense_run_is_named_as_one() -> None:
    settings = {**summary().settings} | {"spec": {"method": "none"}}
    report = render_text(summary(settings=settings, measured=None, total=replace(TOTAL, blocks=())))
    assert "not measured: a dense run" in report
    decided = summary(
        break_even=BreakEven(measured=None), measured=None, total=replace(TOTAL, blocks=())
    )
    assert "not measured: a dense run" in render_text(decided)


def test_the_state_follows_from_the_committed_units() -> None:
    assert summary(units_done=1).state == "incomplete"
    assert summary().state == "completed_with_errors"
    assert summary(total=replace(TOTAL, failed={})).state == "completed"


def test_quantities_have_si_prefixes() -> None:
    assert format_quantity(1_234_567, "B") == "1.23 MB"
    assert format_quantity(3.8e12, "FLOP") == "3.8 TFLOP"
    assert format_quantity(0, "B") == "0 B"


def test_money_is_that_of_the_replica_time_and_its_saving_has_the_interval() -> None:
    measured = MeasuredRatio(ratio=2.5, low=2.0, high=3.0, rows=160, blocks=5)
    total = replace(TOTAL, nanoseconds=7200 * 10**9, retry_nanoseconds=360 * 10**9)
    shown = summary(measured=measured, total=replace(total, control_nanoseconds=720 * 10**9))
    console = Console(width=140)
    with console.capture() as captured:
        console.print(render(shown, price=3.0))
    assert "6 for the rows, 0.9 for measuring and retries; saved 9 (6 – 12), at 3 an hour" in (
        captured.get()
    )
    assert "money" not in render_text(shown)
    with console.capture() as captured:
        console.print(render(summary(measured=None), price=3.6))
    assert "0.01 for the rows" in captured.get()


def test_what_caches_served_is_shown() -> None:
    total = replace(TOTAL, images_cached=40, prefixes_cached=30, flops_cached={"vision": 5})
    report = render_text(summary(total=total))
    assert "40 rows found their image encoded, 30 of them read up to the question" in report
    assert "5 FLOP of these" in report


def test_why_nothing_was_measured_is_said() -> None:
    nothing = replace(TOTAL, blocks=())
    why = "2,048 rows are too few"
    report = render_text(summary(measured=None, total=nothing, not_measured=why))
    assert "not measured: 2,048 rows are too few" in report
    spoiled = render_text(summary(measured=None, total=replace(nothing, blocks_spoiled=3)))
    assert "not measured: 3 control blocks were spoiled" in spoiled
    fewer = render_text(summary(not_measured="each of 2 units has one"))
    assert "each of 2 units has one" in fewer


@pytest.mark.parametrize(
    ("version", "said"), [(2, "met no caches"), (3, "too close to 1"), (4, ""), (5, "")]
)
def test_a_run_of_an_earlier_schema_version_says_how_it_was_measured(
    version: int, said: str
) -> None:
    old = summary()
    report = render_text(replace(old, settings={**old.settings, "schema_version": version}))
    assert said in report
    assert ("an earlier version measured" in report) == bool(said)
