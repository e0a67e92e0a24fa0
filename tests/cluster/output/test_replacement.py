"""Failed rows replaced in place: no answer lost, no row doubled, the ledger that of the rows."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.accounting.ledger import RunLedger, UnitLedger, unit_ledger
from cluster.corpus.packed import pack_unit
from cluster.errors import CommitRefused, StoreError
from cluster.output.commit import commit_unit
from cluster.output.manifest import Manifest
from cluster.output.replacement import RetrySink, merge_rows, replace_rows
from cluster.output.run_output import RunOutput
from cluster.output.unit_names import UnitNames
from cluster.schema import PLANNED_FIELD
from cluster.store import LocalStore, Store, open_store
from tests.cluster.labelled_tables import EXPECTED, mask, row, table

NAMES = UnitNames(run_id="run")
ROWS = 6
FAULT = {"error_code": "inference_failed", "error_message": "out of memory", "error_stage": "infer"}
UNREAD = {"error_code": "read_failed", "error_message": "no mount", "error_stage": "read"}
NOTHING = dict.fromkeys(
    ("text", "visual_tokens", "visual_tokens_kept", "kept_tokens", "prune_method", "prune_spec",
     "seconds")
)  # fmt: skip
Rows = Sequence[dict[str, Any]]


def answer(number: int, text: str = "", **values: Any) -> dict[str, Any]:
    cost = {
        "flops": {"prefill": 10 + number},
        "flops_dense": {"prefill": 40 + number},
        "kv_bytes": 5,
        "kv_bytes_dense": 9,
    }
    made = row(number, text=text or f"t{number}", device="cpu", **cost)
    if number % 3 == 2:
        made |= {"is_control": True, "control_text": "t2", "control_seconds": 0.25 + number}
        made |= {"steady_seconds": 0.125, "control_steady_seconds": 0.25}
    return made | values


def fault(number: int, error: dict[str, Any] = FAULT, **values: Any) -> dict[str, Any]:
    lost: dict[str, Any] = {"note": None, "key": f"file#{number}"} if error is UNREAD else {}
    lost["is_control"] = number % 3 == 2
    return row(number, **NOTHING, **error, **lost) | values


def put_unit(store: Store, rows: Rows) -> RunOutput:
    output = RunOutput(store, NAMES)
    assert commit_unit(planned(rows), expected=EXPECTED, output=output, writer="w").won
    return output


def ask(output: RunOutput, rows: Rows, attempt: str, *, of: int = ROWS) -> None:
    replace_rows(planned(rows, of), expected=EXPECTED, output=output, attempt=attempt)


def planned(rows: Rows, of: int | None = None) -> pa.Table:
    """The rows of a unit that is planned to have `of` rows, or these."""
    return table(*(made | {PLANNED_FIELD.name: of or len(rows)} for made in rows))


def plain(ledger: UnitLedger) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(ledger.to_json())
    return record


# One row after another: what `again` does to `before`.


def after(before: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    if before["error_code"] is None:
        return before
    attempts = before["attempts"] + again["attempts"]
    discarded = before["discarded_seconds"] + again["discarded_seconds"]
    summed = {"attempts": attempts, "discarded_seconds": discarded}
    if again["error_code"] is not None and again["error_stage"] == "read":
        errors = {name: again[name] for name in FAULT}
        return before | errors | summed
    return again | summed | {"is_control": before["is_control"]}


def with_errors(made: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(FAULT) | made


ATTEMPTS = st.integers(0, 3)
OUTCOMES = st.one_of(
    st.builds(lambda n, text: ("answer", n, text), ATTEMPTS, st.sampled_from("xyz")),
    st.builds(lambda n: ("fault", n, ""), ATTEMPTS),
    st.builds(lambda n: ("unread", n, ""), ATTEMPTS),
)


def made_of(number: int, outcome: tuple[str, int, str]) -> dict[str, Any]:
    kind, attempts, text = outcome
    if kind == "answer":
        return with_errors(answer(number, text, attempts=attempts))
    return with_errors(fault(number, UNREAD if kind == "unread" else FAULT, attempts=attempts))


@settings(max_examples=30)
@given(
    first=st.lists(OUTCOMES, min_size=1, max_size=ROWS),
    rounds=st.lists(st.dictionaries(st.integers(0, ROWS - 1), OUTCOMES), max_size=4),
)
def test_whatever_is_asked_again_the_unit_is_that_of_its_rows(
    first: list[tuple[str, int, str]], rounds: list[dict[int, tuple[str, int, str]]]
) -> None:
    """Rows, order, schema and ledger, for any rows asked again with any results."""
    expected = [made_of(number, outcome) for number, outcome in enumerate(first)]
    with TemporaryDirectory() as folder:
        output = put_unit(open_store(folder), expected)
        schema = output.read_unit("unit").schema
        for number, results in enumerate(rounds):
            again = {n: made_of(n, outcome) for n, outcome in results.items() if n < len(first)}
            if not again:
                continue
            ask(output, list(again.values()), f"attempt {number}", of=len(first))
            ask(output, list(again.values()), f"attempt {number}", of=len(first))  # a rerun of Ray
            expected = [after(e, again[n]) if n in again else e for n, e in enumerate(expected)]
        unit = output.open_unit("unit")
        reference = table(*expected)
        assert unit.table.schema == schema
        assert unit.table.to_pylist() == reference.select(unit.table.column_names).to_pylist()
        assert plain(unit.footer.ledger) == plain(unit_ledger(reference))
        assert (unit.footer.run_id, unit.footer.unit_id) == ("run", "unit")
        mended = sum(retry.mended for retry in unit.footer.retries)
        failed_first = sum(kind != "answer" for kind, *_ in first)
        assert mended == failed_first - unit.footer.ledger.rows_failed


def test_a_row_that_cannot_be_read_any_more_keeps_its_key_and_columns(tmp_path: Path) -> None:
    output = put_unit(open_store(tmp_path), [fault(0), answer(1)])
    ask(output, [fault(0, UNREAD)], "again", of=2)
    (failed, _) = output.read_unit("unit").to_pylist()
    assert (failed["key"], failed["note"]) == ("k0", "n0")
    assert (failed["error_code"], failed["attempts"]) == ("read_failed", 2)


def test_a_row_that_could_not_be_read_gets_its_key_and_columns(tmp_path: Path) -> None:
    output = put_unit(open_store(tmp_path), [fault(0, UNREAD, attempts=0), answer(1)])
    ask(output, [answer(0)], "again", of=2)
    (mended, _) = output.read_unit("unit").to_pylist()
    assert (mended["key"], mended["note"], mended["text"]) == ("k0", "n0", "t0")


def test_a_merge_that_breaks_a_claim_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    output = put_unit(store, [fault(0), answer(1)])
    before = store.list()
    wrong = answer(0, visual_tokens_kept=99, kept_tokens=mask(99, 100))
    with pytest.raises(CommitRefused, match="row 0 kept 99 of 100"):
        ask(output, [wrong], "again", of=2)
    assert store.list() == before


class Killed(BaseException):
    """What ends a process ends it between any two steps."""


class FaultyStore(LocalStore):
    """A store whose next replacement is killed or preceded by another writer."""

    before: Callable[[], None] = staticmethod(lambda: None)
    after: Callable[[], None] = staticmethod(lambda: None)

    def put_if_match(self, key: str, data: bytes, *, etag: str, writer: str) -> bool:
        before, self.before = self.before, lambda: None
        before()
        replaced = super().put_if_match(key, data, etag=etag, writer=writer)
        after, self.after = self.after, lambda: None
        after()
        return replaced


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_attempt_killed_at_its_write_is_repeated(tmp_path: Path, moment: str) -> None:
    store = FaultyStore(tmp_path)
    output = put_unit(store, [fault(0), answer(1), fault(2)])
    setattr(store, moment, kill)
    results = [answer(0), fault(2)]
    with pytest.raises(Killed):
        ask(output, results, "killed", of=3)
    assert len(pq.read_table(tmp_path)) == 3
    ask(output, results, "killed", of=3)  # Ray reruns the write
    unit = output.open_unit("unit")
    assert unit.table["attempts"].to_pylist() == [2, 1, 2]
    assert [(r.asked, r.mended) for r in unit.footer.retries] == [(2, 1)]
    ask(output, [answer(2)], "next", of=3)
    assert output.open_unit("unit").footer.ledger.failed == {}


def test_of_two_attempts_at_once_every_answer_counts(tmp_path: Path) -> None:
    """The second merges anew what the first has written."""
    store = FaultyStore(tmp_path)
    output = put_unit(store, [fault(number) for number in range(4)])
    other = RunOutput(LocalStore(tmp_path), NAMES)
    store.before = lambda: ask(other, [answer(0, "b"), answer(1, "b"), fault(2)], "b", of=4)
    ask(output, [answer(0, "a"), fault(1), answer(2, "a"), fault(3)], "a", of=4)
    unit = output.open_unit("unit")
    assert unit.table["text"].to_pylist() == ["b", "b", "a", None]
    assert unit.table["attempts"].to_pylist() == [2, 2, 3, 2]
    assert [(r.writer, r.asked, r.mended) for r in unit.footer.retries] == [
        ("b", 3, 2),
        ("a", 2, 1),
    ]
    assert plain(unit.footer.ledger)["failed"] == {"inference_failed": 1}


def test_a_store_that_never_compares_is_named(tmp_path: Path) -> None:
    class Refusing(LocalStore):
        def put_if_match(self, key: str, data: bytes, *, etag: str, writer: str) -> bool:
            return False

    output = put_unit(Refusing(tmp_path), [fault(0)])
    with pytest.raises(StoreError, match="must honour If-Match"):
        ask(output, [answer(0)], "again", of=1)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_readers_see_each_row_once_while_two_attempts_replace(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """As pyarrow, its data sets and pandas read a folder; our own reader on S3, which pins the
    version of each object."""
    uri = str(tmp_path) if place == "local" else request.getfixturevalue("s3")
    units = [f"unit{number}" for number in range(5 if place == "local" else 2)]
    output = RunOutput(open_store(uri), NAMES)
    for unit in units:
        rows = [(fault if n % 2 else answer)(n, unit_id=unit) for n in range(ROWS)]
        assert commit_unit(planned(rows), expected=EXPECTED, output=output, writer=unit).won
    positions = sorted((unit, number) for unit in units for number in range(ROWS))

    def retry(attempt: int) -> None:
        for step in range(3):
            for unit in units:
                number = 2 * ((step + attempt) % 3) + 1
                labelled = planned([answer(number, f"by {attempt}", unit_id=unit)], ROWS)
                name = f"{attempt}-{step}"
                replace_rows(labelled, expected=EXPECTED, output=output, attempt=name)

    def read() -> list[pa.Table]:
        if place == "s3":
            return [pa.concat_tables(output.read_units(units, ["unit_id", "unit_row"]))]
        return [
            pq.read_table(uri),
            ds.dataset(uri).to_table(),
            pa.Table.from_pandas(pd.read_parquet(uri)),
        ]

    ended = threading.Event()

    def watch() -> int:
        times = 0
        while not ended.is_set():
            _check(read(), positions)
            times += 1
        return times

    with ThreadPoolExecutor(3) as pool:
        attempts = [pool.submit(retry, attempt) for attempt in (0, 1)]
        watching = pool.submit(watch)
        for attempt in attempts:
            attempt.result()
        ended.set()
        assert watching.result(), "nothing was read meanwhile"
    _check(read(), positions)
    ledger = RunLedger.of(output.ledgers(units))
    assert (ledger.total.rows, ledger.total.failed) == (len(units) * ROWS, {})


def _check(tables: Sequence[pa.Table], planned: list[tuple[str, int]]) -> None:
    for read in tables:
        positions = zip(read["unit_id"].to_pylist(), read["unit_row"].to_pylist(), strict=True)
        assert sorted(positions) == planned


class _Planned:
    """The part of a manifest that a sink reads."""

    run_id, kind = "run", "caption"
    mapping, plan = type("Mapping", (), {"schema": EXPECTED.source_schema}), None


def test_a_sink_replaces_the_rows_of_packed_units(tmp_path: Path) -> None:
    store, told = open_store(tmp_path), list[int]()
    output = put_unit(store, [fault(0), answer(1), fault(2)])
    store.put("_run/manifest.json", b'{"run_id": "run"}')
    sink = RetrySink(
        cast(Manifest, _Planned()), output, on_commit=lambda *event: told.append(event[1].rows)
    )
    block = pack_unit(planned([answer(0), answer(2)], 3))
    assert sink.write([block], None) == 1
    assert sink.write([block], None) == 1, "a rerun changes nothing"
    assert sink.get_name() == "Replace"
    (footer,) = output.footers(["unit"])
    assert (footer.ledger.failed, len(footer.retries)) == ({}, 1)
    assert told == [3, 3]


def test_a_row_handed_over_twice_replaces_once() -> None:
    """Ray may rerun what came before the write."""
    committed = table(fault(0), answer(1)).drop_columns(["_in_unit", "_in_unit_rows"])
    merged = merge_rows(committed, table(answer(0), answer(0)))
    assert merged.table["unit_row"].to_pylist() == [0, 1]
    assert merged.asked == merged.mended == 1
    assert pc.sum(merged.table["attempts"]).as_py() == 3


def test_a_value_of_another_type_than_the_unit_has_is_refused_with_unit_and_column() -> None:
    committed = table(fault(0), answer(1)).drop_columns(["_in_unit", "_in_unit_rows"])
    labelled = table(answer(0))
    place = labelled.column_names.index("kv_bytes")
    unfit = labelled.set_column(place, "kv_bytes", pa.array(["many"]))
    with pytest.raises(CommitRefused, match="unit unit: column 'kv_bytes' cannot be committed"):
        merge_rows(committed, unfit)
