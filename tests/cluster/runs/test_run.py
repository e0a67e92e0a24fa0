"""Warnings before a run starts, and how it ends. Whole runs are tested in tests/integration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from rich.console import Console

from cluster.accounting.ledger import UnitLedger
from cluster.errors import FleetUnavailable
from cluster.output.summary import Summary
from cluster.runs import run
from cluster.serving.fleet import Fleet, FleetStats, _sum_stats


@pytest.mark.parametrize(("free", "warned"), [(0.75, True), (0.0, True), (0.85, False), (4, False)])
def test_a_run_that_has_to_wait_for_cpus_warns(
    free: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": free} if free else {})
    console = Console(width=200)
    with console.capture() as captured:
        run._warn_if_starved(console, actors=1)
    assert ("waits until other work ends" in captured.get()) == warned


@pytest.mark.parametrize(
    ("done", "failed", "code"),
    [(1, {}, 5), (1, {"poison_row": 1}, 5), (2, {}, 0), (2, {"x": 1}, 3)],
)
def test_only_a_complete_run_exits_with_zero(done: int, failed: dict[str, int], code: int) -> None:
    summary = Summary(
        run_id="r", created="", settings={}, input="i", output="o", units=2, units_done=done,
        rows_planned=4, total=UnitLedger(rows=2 * done, failed=failed), measured=None,
        duplicate_keys=0, accuracy=None,
    )  # fmt: skip
    assert run.Outcome(summary=summary, note=None).exit_code == code


def stats(**busy_and_uptime: tuple[float, float]) -> FleetStats:
    """Counters of replicas by the number in their name, which is the pid."""
    replicas = [
        SimpleNamespace(pid=name, rows=1, busy_seconds=busy, uptime_seconds=uptime)
        for name, (busy, uptime) in busy_and_uptime.items()
    ]
    return _sum_stats(cast(Any, replicas))


def test_the_busy_share_counts_replicas_that_joined_and_knows_nothing_of_replaced_ones() -> None:
    before = stats(a=(1.0, 10.0))
    assert run._busy_share(before, stats(a=(6.0, 20.0))) == 0.5
    assert run._busy_share(before, stats(a=(9.0, 20.0), b=(1.0, 10.0))) == 0.45
    assert run._busy_share(before, stats(b=(9.0, 20.0))) is None


def test_replicas_that_do_not_answer_cost_a_figure_and_not_the_run() -> None:
    class Gone:
        app = "app"

        def stats(self) -> None:
            raise FleetUnavailable("no replica answers")

    assert run._stats(cast(Fleet, Gone())) is None
    assert run._busy_share(None, stats(a=(1.0, 1.0))) is None
    assert run._busy_share(stats(a=(1.0, 1.0)), None) is None
