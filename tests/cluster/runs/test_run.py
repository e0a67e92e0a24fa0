"""How a run ends. Whole runs are tested in tests/integration."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from cluster.accounting.ledger import UnitLedger
from cluster.config import RunConfig
from cluster.errors import SettingsChanged, UsageError
from cluster.output.run_output import RunOutput
from cluster.output.summary import Attempt, Summary, summarise
from cluster.runs import run
from cluster.store import open_store
from sppruner.engine import SamplingParams
from sppruner.models.loading import EMBEDDED
from sppruner.spec import DENSE
from tests.cluster.corpora import config, plan, put_parquet


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


def test_a_retry_says_how_many_rows_its_corpus_gave(tmp_path: Path) -> None:
    put_parquet(open_store(tmp_path / "in"), "a.parquet", pa.table({"image": [b"0", b"1", b"2"]}))
    planned = plan(f"{tmp_path}/in", f"{tmp_path}/out", unit_rows=2)
    manifest, units = planned.manifest, planned.units
    failed = {units[0].unit_id: [0, 1], units[1].unit_id: [0]}

    def note(asked: int) -> str | None:
        attempt = Attempt(
            rows=asked, wall_seconds=1.0, start_seconds=1.0, rows_per_second=1.0, replicas=1,
            replica_busy_share=None,
        )  # fmt: skip
        return run._note(manifest, units, failed, summarise(planned.output, attempt))

    assert note(3) == "3 failed rows of 2 units were asked again"
    assert note(1) == (
        "1 of 3 failed rows of 2 units were asked again; the others were mended meanwhile, or "
        f"{tmp_path}/in did not give them"
    )


def test_a_run_of_a_hub_model_keeps_the_revision_that_it_began_with(tmp_path: Path) -> None:
    """Somebody else's commit must not make it another run."""
    put_parquet(open_store(tmp_path / "in"), "a.parquet", pa.table({"image": [b"0"]}))
    planned = plan(f"{tmp_path}/in", f"{tmp_path}/out", model="org/vlm")

    def pinned(model: str, *, again: bool = False, output: str = "out") -> str | None:
        settings = config(f"{tmp_path}/in", f"{tmp_path}/{output}", model=model)
        asked = planned.manifest if again else None
        return run._planned_revision(settings, RunOutput.open(settings.output), asked)

    assert planned.manifest.identity.settings["model_revision"] == "r1"
    assert pinned("org/vlm") == "r1"
    assert pinned("org/vlm", output="new") is None
    assert pinned("org/other") is None, "that is another run, and planning says so"
    assert pinned(EMBEDDED) is None, "the files of a folder are compared"
    assert pinned(EMBEDDED, again=True) == "r1"


def test_a_run_keeps_the_dtype_of_its_first_replicas(tmp_path: Path) -> None:
    """Begun on a GPU and gone on with on a CPU, `auto` would be two things in one output."""
    put_parquet(open_store(tmp_path / "in"), "a.parquet", pa.table({"image": [b"0"]}))
    places = f"{tmp_path}/in", f"{tmp_path}/out"
    planned = plan(*places)
    auto, named = config(*places), config(*places, dtype="bfloat16")
    output = planned.output

    run.check_dtype(auto, planned.manifest, output, "bfloat16")
    run.check_dtype(auto, planned.manifest, output, "bfloat16")
    with pytest.raises(SettingsChanged, match=r"bfloat16, and those here .* add --dtype bfloat16"):
        run.check_dtype(auto, planned.manifest, output, "float32")

    assert run._as_planned(named, output) == auto, "the same run"
    run.check_dtype(named, planned.manifest, output, "bfloat16")
    other = config(*places, dtype="float32")
    assert run._as_planned(other, output) == other, "which planning refuses"
    place = f"{tmp_path}/older"
    older = plan(places[0], place)
    unit = older.units[0].unit_id
    older.output.commit_unit(unit, pa.table({"key": ["a"]}), UnitLedger(rows=1), writer="w")
    run.check_dtype(config(places[0], place), older.manifest, older.output, "float32")
    assert older.output.dtype() is None, "an earlier version labelled it, nobody knows in what"
    new = config(places[0], f"{tmp_path}/new", dtype="bfloat16")
    assert run._as_planned(new, RunOutput.open(new.output)) == new


def test_a_run_that_names_its_dtype_keeps_it_in_its_identity(tmp_path: Path) -> None:
    put_parquet(open_store(tmp_path / "in"), "a.parquet", pa.table({"image": [b"0"]}))
    places = f"{tmp_path}/in", f"{tmp_path}/out"
    planned = plan(*places, dtype="bfloat16")
    named = config(*places, dtype="bfloat16")
    assert run._as_planned(named, planned.output) == named
    run.check_dtype(named, planned.manifest, planned.output, "bfloat16")
    assert planned.output.dtype() is None
    assert summarise(planned.output).dtype == "bfloat16"
