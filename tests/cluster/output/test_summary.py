"""The summary: sums over committed units, duplicate keys and accuracy, from the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.ledger import UnitLedger
from cluster.accounting.speedup import Block
from cluster.errors import StoreError, UsageError
from cluster.output import summary as summary_module
from cluster.output.accuracy import Accuracy
from cluster.output.run_output import RunOutput
from cluster.output.summary import Attempt, Generation, is_current, keep_summary, summarise
from cluster.output.unit_file import Retry, UnitFooter, write_unit_file
from cluster.output.unit_names import UnitNames
from cluster.report.terminal import render
from cluster.store import open_store
from tests.cluster.corpora import Planned, plan, put_parquet, tar_bytes
from tests.cluster.labelled_tables import SPEC


def plan_two_units(folder: Path, *, kind: str = "caption", **columns: Any) -> Planned:
    """A run of two units of two rows over a corpus with these columns."""
    images = pa.array([b"0", b"1", b"2", b"3"], pa.binary())
    put_parquet(open_store(f"{folder}/in"), "a.parquet", pa.table({"image": images, **columns}))
    return plan(f"{folder}/in", f"{folder}/out", kind=kind, spec=SPEC, unit_rows=2)


def commit(planned: Planned, number: int, ledger: UnitLedger, **columns: Any) -> None:
    """Commits unit `number` with the columns that a summary reads."""
    unit_id = planned.units[number].unit_id
    assert planned.output.commit_unit(unit_id, pa.table(columns), ledger, writer="w")


def test_a_run_without_commits_is_incomplete_and_has_no_measurements(tmp_path: Path) -> None:
    summary = summarise(plan_two_units(tmp_path).output)
    assert (summary.state, summary.units, summary.units_done) == ("incomplete", 2, 0)
    assert (summary.rows_planned, summary.total) == (4, UnitLedger())
    assert (summary.measured, summary.duplicate_keys, summary.accuracy) == (None, None, None)
    assert (summary.attempt, summary.break_even) == (None, None)


def test_a_summary_sums_committed_units_and_counts_rows_with_shared_keys(tmp_path: Path) -> None:
    planned = plan_two_units(tmp_path)
    commit(planned, 0, UnitLedger(rows=2, blocks=(Block(1, 2, 1),)), key=["a", "b"])
    assert summarise(planned.output).state == "incomplete"
    assert summarise(planned.output).duplicate_keys == 0

    commit(planned, 1, UnitLedger(rows=2, failed={"image_missing": 1}), key=["a", "c"])
    summary = summarise(planned.output.uri)
    assert (summary.state, summary.units_done) == ("completed_with_errors", 2)
    assert (summary.total.rows, summary.total.rows_failed) == (4, 1)
    assert summary.duplicate_keys == 2
    assert summary.measured is not None
    assert summary.measured.ratio == 2.0


def test_units_of_another_run_in_the_prefix_are_not_summed(tmp_path: Path) -> None:
    planned = plan_two_units(tmp_path)
    commit(planned, 0, UnitLedger(rows=2), key=["a", "b"])
    planned.output.commit_unit("stray", pa.table({"key": ["x"]}), UnitLedger(rows=1), writer="w")
    summary = summarise(planned.output)
    assert summary.total.rows == 2
    (stray,) = summary.foreign
    assert stray.endswith("-stray.parquet")


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("keys", (RunOutput, "read_units")),
        ("keys", (summary_module, "_count_duplicates")),
        ("accuracy", (summary_module, "_accuracy")),
        ("break-even", (RunOutput, "break_even")),
        ("foreign", (RunOutput, "foreign_objects")),
        ("dtype", (RunOutput, "dtype")),
    ],
)
@pytest.mark.parametrize("error", [StoreError("away"), MemoryError(), TypeError("odd")])
def test_a_part_that_cannot_be_made_is_named_and_costs_no_other(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    broken: tuple[Any, str],
    error: Exception,
) -> None:
    """All rows are paid for by then: no figure about them may fail the run."""
    planned = plan_two_units(tmp_path)
    commit(planned, 0, UnitLedger(rows=2), key=["a", "a"])

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(*broken, fail)
    summary = summarise(planned.output)
    assert list(summary.unavailable) == [part]
    assert summary.unavailable[part].startswith(type(error).__name__)
    assert summary.total.rows == 2
    assert json.loads(summary.to_json())["unavailable"] == summary.unavailable
    render(summary)


def test_a_summary_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    planned = plan_two_units(tmp_path)
    (tmp_path / "out" / "_run" / "summary.json").mkdir()
    keep_summary(planned.output, summarise(planned.output))
    assert (tmp_path / "out" / "_run" / "summary.json").is_dir(), "it stands in its place"


def test_a_summary_is_current_while_it_says_of_the_rows_what_is_so(tmp_path: Path) -> None:
    """A driver may be killed between its last commit and its summary."""
    planned = plan_two_units(tmp_path)
    assert not is_current(planned.output.summary(), summarise(planned.output))
    for number, failed in enumerate(({"image_missing": 1}, {})):
        commit(planned, number, UnitLedger(rows=2, failed=failed), key=["a", "b"])
        stale, now = planned.output.summary(), summarise(planned.output)
        assert not is_current(stale, now)
        keep_summary(planned.output, now)
        assert is_current(planned.output.summary(), summarise(planned.output))
    for text in (b"", b"[]", b"{", b'{"rows": 4}'):
        assert not is_current(text, now)


def test_what_asking_again_did_is_summed_by_generation(tmp_path: Path) -> None:
    planned = plan_two_units(tmp_path)
    names, store = UnitNames.of(planned.manifest), open_store(planned.output.uri)
    twice = (Retry(writer="a", asked=2, mended=1), Retry(writer="b", asked=1, mended=0))
    for unit, retries in zip(planned.units, (twice, twice[1:]), strict=True):
        footer = UnitFooter(
            ledger=UnitLedger(rows=2),
            run_id=names.run_id,
            unit_id=unit.unit_id,
            retries=retries,
        )
        store.put(names.key(unit.unit_id), write_unit_file(pa.table({"key": ["a", "b"]}), footer))
    assert summarise(planned.output).generations == (
        Generation(number=1, units=2, asked=3, mended=1),
        Generation(number=2, units=1, asked=1, mended=0),
    )


def test_keys_of_a_run_with_too_many_rows_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys of a large run do not fit the driver's memory."""
    planned = plan_two_units(tmp_path)
    commit(planned, 0, UnitLedger(rows=2), key=["a", "a"])
    monkeypatch.setattr(summary_module, "_KEYS_COMPARED", 1)
    summary = summarise(planned.output)
    assert summary.duplicate_keys is None
    assert summary.unavailable == {"keys": "more than 1 rows to compare"}


def test_a_vqa_run_with_references_has_an_accuracy_however_many_rows_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary_module, "_KEYS_COMPARED", 1)
    columns = {"question": ["q"] * 4, "answers": [["red"], ["blue"], ["red"], ["red"]]}
    planned = plan_two_units(tmp_path, kind="vqa", **columns)
    outputs = {"key": ["a", "b"], "answer": ["red", "red"], "answers": [["red"], ["blue"]]}
    commit(planned, 0, UnitLedger(rows=2), **outputs)
    assert summarise(planned.output).accuracy == Accuracy(scored=2, mean=0.5)


def test_answers_beside_the_questions_of_tars_are_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [f'{{"question": "q", "answers": ["{answer}"]}}' for answer in ("red", "blue")]
    records += ['{"question": "q"}', "{broken"]
    members = [
        member
        for number, record in enumerate(records)
        for member in ((f"{number}.jpg", b"j"), (f"{number}.json", record.encode()))
    ]
    open_store(f"{tmp_path}/in").put("a.tar", tar_bytes(members))
    planned = plan(f"{tmp_path}/in", f"{tmp_path}/out", kind="vqa", spec=SPEC, unit_rows=2)
    monkeypatch.setattr(summary_module, "_UNITS_AT_ONCE", 1)
    for number, keys in enumerate((["a", "b"], ["a", "c"])):
        rows = records[2 * number : 2 * number + 2]
        commit(planned, number, UnitLedger(rows=2), key=keys, answer=["red", "red"], json=rows)
    summary = summarise(planned.output)
    assert summary.accuracy == Accuracy(scored=2, mean=0.5)
    assert summary.duplicate_keys == 2


def test_questions_of_tars_without_answers_beside_them_have_no_accuracy(tmp_path: Path) -> None:
    records = ['{"question": "q"}'] * 2
    members = [("a.jpg", b"j"), ("a.json", records[0].encode())]
    members += [("b.jpg", b"j"), ("b.json", records[1].encode())]
    open_store(f"{tmp_path}/in").put("a.tar", tar_bytes(members))
    planned = plan(f"{tmp_path}/in", f"{tmp_path}/out", kind="vqa", spec=SPEC)
    columns = {"key": ["a", "b"], "answer": ["red", "red"], "json": records}
    commit(planned, 0, UnitLedger(rows=2), **columns)
    assert summarise(planned.output).accuracy is None


def test_a_vqa_run_without_references_has_no_accuracy(tmp_path: Path) -> None:
    planned = plan_two_units(tmp_path, kind="vqa", question=["q"] * 4)
    commit(planned, 0, UnitLedger(rows=2), key=["a", "b"], answer=["red", "blue"])
    assert summarise(planned.output).accuracy is None


def test_the_json_of_a_summary_has_attempt_decision_and_accuracy(tmp_path: Path) -> None:
    """`report.py --json` and `_run/summary.json` are read by programs: keys are a contract."""
    columns = {"question": ["q"] * 4, "answers": [["red"]] * 4}
    planned = plan_two_units(tmp_path, kind="vqa", **columns)
    outputs = {"key": ["a", "b"], "answer": ["red", "red"], "answers": [["red"], ["red"]]}
    ledger = UnitLedger(rows=2, blocks=(Block(1, 3, 1),), agreements=1)
    commit(planned, 0, ledger, **outputs)
    planned.output.keep_break_even(BreakEven(measured=None))
    planned.output.keep_dtype("bfloat16")
    attempt = Attempt(
        rows=2,
        wall_seconds=4.0,
        start_seconds=1.0,
        rows_per_second=0.5,
        replicas=1,
        replica_busy_share=None,
    )
    data = json.loads(summarise(planned.output, attempt).to_json())
    assert (data["run_id"], data["state"]) == (planned.manifest.run_id, "incomplete")
    assert data["dtype"] == "bfloat16"
    assert data["attempt"]["rows_per_second"] == 0.5
    assert data["break_even"] == {
        "pays": False,
        "measured": None,
        "evidence": [],
        "seconds": 0.0,
    }
    assert data["accuracy"] == {"scored": 2, "mean": 1.0}
    assert data["measured"]["dense_over_pruned"]["ratio"] == 3.0
    assert data["measured"]["control_agreements"] == 1


def test_a_prefix_without_a_run_cannot_be_summarised(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        summarise(str(tmp_path))
