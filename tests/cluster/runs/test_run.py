"""Warnings before a run starts, and how it ends. Whole runs are tested in tests/integration."""

from __future__ import annotations

from typing import cast

import pytest
import ray
from rich.console import Console

from cluster.accounting.ledger import UnitLedger
from cluster.output.summary import Summary
from cluster.runs import run
from cluster.serving.fleet import Fleet


@pytest.mark.parametrize(("free", "warned"), [(0.75, True), (0.0, True), (0.85, False), (4, False)])
def test_a_run_that_has_to_wait_for_cpus_warns(
    free: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": free} if free else {})
    console = Console(width=200)
    with console.capture() as captured:
        run._warn_if_starved(console)
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


def test_a_replica_that_does_not_answer_costs_a_figure_and_not_the_run() -> None:
    class Gone:
        app, replicas = "app", 1

        def stats(self) -> None:
            raise TimeoutError

    assert run._busy_seconds(cast(Fleet, Gone())) is None
    assert run._busy_share(cast(Fleet, Gone()), 1.0, 2.0) is None
