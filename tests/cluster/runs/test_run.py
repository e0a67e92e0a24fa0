"""How a run ends. Whole runs are tested in tests/integration."""

from __future__ import annotations

import pytest

from cluster.accounting.ledger import UnitLedger
from cluster.output.summary import Summary
from cluster.runs import run


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
