"""How a run ends. Whole runs are tested in tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.accounting.ledger import UnitLedger
from cluster.config import RunConfig
from cluster.errors import UsageError
from cluster.output.summary import Summary
from cluster.runs import run
from sppruner.engine import SamplingParams
from sppruner.models.loading import EMBEDDED
from sppruner.spec import DENSE


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


def test_answers_longer_than_the_model_s_context_are_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    """Each row would fail by itself, and such errors are not asked again."""
    config = RunConfig(
        kind="caption", input=str(tmp_path / "in"), output=str(tmp_path / "out"), model=EMBEDDED,
        prompt="p", spec=DENSE, generation=SamplingParams(max_new_tokens=100_000),
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"--max-new-tokens 100000: .* tokens in this model"):
        run.run(config)
