"""The output of a run: its keys are a contract, and objects that are not a run's are refused."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.ledger import UnitLedger
from cluster.accounting.speedup import MeasuredRatio
from cluster.corpus.columns import ColumnMapping
from cluster.errors import ObjectGone, StoreError, UsageError
from cluster.output.run_output import RunOutput
from cluster.output.summary import summarise
from cluster.output.unit_file import UnitFooter, write_unit_file
from cluster.output.unit_names import UnitNames
from cluster.report.terminal import render
from cluster.store import LocalStore, ObjectInfo, Store, open_store
from tests.cluster.corpora import Planned, image, plan, put_parquet


@pytest.fixture
def store(s3: str) -> Store:
    return open_store(f"{s3}/out")


@pytest.fixture
def output(store: Store) -> RunOutput:
    return RunOutput(store, UnitNames(run_id="run"))


ROWS = pa.table({"key": ["a", "b"], "text": ["x", None]})
VOICES = ["footer", "rows"]


def test_the_keys_of_an_output_are_fixed(tmp_path: Path) -> None:
    """Runs of earlier versions are resumed and read by these keys."""
    put_parquet(open_store(f"{tmp_path}/in"), "a.parquet", pa.table({"image": [image()["bytes"]]}))
    manifest, output = plan(f"{tmp_path}/in", f"{tmp_path}/out")
    output.commit_unit("u1", ROWS, UnitLedger(rows=2), writer="w")
    output.keep_break_even(BreakEven(measured=None))
    output.keep_dtype("float32")
    output.put_summary("{}")
    keys = {info.key for info in open_store(f"{tmp_path}/out").list()}
    assert keys == {
        f"{manifest.run_id}-u1.parquet",
        "_run/manifest.json",
        "_run/break-even.json",
        "_run/dtype.json",
        "_run/summary.json",
    }
    assert pq.read_table(f"{tmp_path}/out").to_pylist() == ROWS.to_pylist()


def test_a_unit_is_read_whole_or_by_column(output: RunOutput) -> None:
    assert output.commit_unit("u1", ROWS, UnitLedger(rows=2), writer="w")
    assert output.committed_units() == {"u1"}
    assert output.unit_columns("u1") == ["key", "text"]
    assert output.read_unit("u1").to_pylist() == ROWS.to_pylist()
    assert output.read_unit("u1", ["text"]).to_pydict() == {"text": ["x", None]}


def test_a_column_that_a_unit_lacks_is_no_damage(output: RunOutput) -> None:
    """The advice for a damaged object is to remove it: never where the reader is at fault."""
    output.commit_unit("u1", ROWS, UnitLedger(rows=2), writer="w")
    with pytest.raises(UsageError, match=r"has no column \['capton'\], only \['key', 'text'\]"):
        output.read_unit("u1", ["text", "capton"])


def test_the_first_of_two_writers_commits_the_unit(output: RunOutput) -> None:
    assert output.commit_unit("u1", ROWS, UnitLedger(rows=2), writer="first")
    assert not output.commit_unit("u1", ROWS.slice(0, 1), UnitLedger(rows=1), writer="second")
    assert output.ledgers(["u1"]) == [UnitLedger(rows=2)]


@pytest.mark.parametrize("units", [3, 40])
def test_ledgers_are_returned_in_the_requested_order(output: RunOutput, units: int) -> None:
    """A few units take one request each, many units one listing."""
    names = [f"u{number}" for number in range(units)]

    def commit(number: int) -> bool:
        ledger = UnitLedger(rows=number)
        return output.commit_unit(f"u{number}", ROWS, ledger, writer=str(number))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(commit, range(units)))
    assert [ledger.rows for ledger in output.ledgers(names[::-1])] == list(range(units))[::-1]
    with pytest.raises(StoreError, match=r"u999\.parquet: this unit is not committed"):
        output.ledgers([*names, "u999"])


def test_objects_that_are_not_units_are_refused_by_name(output: RunOutput, store: Store) -> None:
    put_parquet(store, "run-u1.parquet", pa.table({"x": [1]}))
    store.put("run-u2.parquet", b"not parquet")
    with pytest.raises(StoreError, match=r"u1\.parquet: no ledger"):
        output.ledgers(["u1"])
    with pytest.raises(StoreError, match=r"u2\.parquet: not a Parquet file"):
        output.ledgers(["u2"])
    with pytest.raises(StoreError, match=r"u3\.parquet: this unit is not committed"):
        output.ledgers(["u3"])


def test_damage_anywhere_in_an_output_names_the_object(output: RunOutput, store: Store) -> None:
    table = pa.table({"key": [f"row {number}" for number in range(4000)], "text": ["x"] * 4000})
    assert output.commit_unit("u1", table, UnitLedger(rows=4000), writer="w")
    data = bytearray(store.get("run-u1.parquet"))
    data[200:1200] = bytes(1000)
    store.put("run-u1.parquet", bytes(data))
    with pytest.raises(StoreError, match=r"u1\.parquet.*remove it and resume"):
        output.read_unit("u1")
    store.put("_run/break-even.json", b'{"cho')
    with pytest.raises(StoreError, match=r"break-even\.json.*remove it"):
        output.break_even()


def test_a_ledger_of_another_version_is_named(output: RunOutput, store: Store) -> None:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, ROWS.schema) as writer:
        writer.write_table(ROWS)
        writer.add_key_value_metadata({"sppruner.ledger": '{"rows": 2, "of_tomorrow": 1}'})
    store.put("run-u9.parquet", sink.getvalue().to_pybytes())
    with pytest.raises(StoreError, match=r"u9\.parquet: not a ledger this version can read"):
        output.ledgers(["u9"])


def test_a_prefix_without_a_run_has_no_manifest_and_requiring_one_is_a_usage_error(
    store: Store,
) -> None:
    output = RunOutput(store)
    assert output.manifest() is None
    assert output.committed_units() == set()
    assert output.first_parquet_object() is None
    with pytest.raises(UsageError, match=r"holds no run \(no _run/manifest\.json\)"):
        output.require_manifest()
    with pytest.raises(UsageError, match=r"holds no run"):
        output.commit_unit("u1", ROWS, UnitLedger(rows=2), writer="w")


def test_the_first_break_even_decision_is_kept(output: RunOutput) -> None:
    measured = MeasuredRatio(ratio=2.0, low=1.5, high=2.5, rows=8, blocks=3)
    first, second = BreakEven(measured=measured), BreakEven(measured=None)
    assert output.break_even() is None
    assert output.keep_break_even(first) == first
    assert output.keep_break_even(second) == first
    assert output.break_even() == first


def test_the_dtype_of_the_first_replicas_holds(output: RunOutput) -> None:
    assert output.dtype() is None
    assert output.keep_dtype("bfloat16") == "bfloat16"
    assert output.keep_dtype("float32") == "bfloat16"
    assert output.dtype() == "bfloat16"
    store = open_store(output.uri)
    for broken in (b"{", b"[]", b"{}"):
        store.put("_run/dtype.json", broken)
        with pytest.raises(StoreError, match=r"_run/dtype\.json: no dtype"):
            output.dtype()


def test_a_store_with_conditional_writes_is_taken(output: RunOutput) -> None:
    output.check_first_writer_wins()
    output.check_replaced_by_version()


def test_a_store_that_does_not_answer_is_no_missing_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = run_of(tmp_path, f"{tmp_path}/out", "p")
    assert planned.output.is_here()

    def refuse(*_: object, **__: object) -> bytes:
        raise StoreError("no answer")

    with monkeypatch.context() as away:
        away.setattr(LocalStore, "get_range", refuse)
        assert planned.output.is_here(), "whoever writes waits for it, with patience"
    output = pickle.loads(pickle.dumps(planned.output))
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert not output.is_here()


def test_a_summary_is_replaced(output: RunOutput, store: Store) -> None:
    assert output.summary() is None
    output.put_summary("{}")
    output.put_summary('{"rows": 1}')
    assert output.summary() == b'{"rows": 1}'
    assert store.get("_run/summary.json") == b'{"rows": 1}'


# Ownership: the rows of a run are its own, whatever else writes to the prefix.


def run_of(tmp_path: Path, output: str, prompt: str) -> Planned:
    """A run of two units; another prompt makes another run with units of the same ids."""
    corpus = open_store(f"{tmp_path}/in")
    if not corpus.list():
        put_parquet(corpus, "a.parquet", pa.table({"image": pa.array([b"0", b"1"], pa.binary())}))
    return plan(corpus.uri, output, prompt=prompt, unit_rows=1)


def late_writer(tmp_path: Path, output: str, layout: int) -> tuple[Planned, RunOutput]:
    """A new run in the prefix of an older one, and the output as that one's last task holds it."""
    old = run_of(tmp_path, output, "old")
    names = replace(UnitNames.of(old.manifest), layout=layout)
    (Path(output) / "_run" / "manifest.json").unlink()
    new = run_of(tmp_path, output, "new")
    assert {u.unit_id for u in new.units} == {u.unit_id for u in old.units}
    return new, RunOutput(open_store(output), names)


def test_a_late_writer_of_an_older_run_adds_nothing_to_a_new_one(tmp_path: Path) -> None:
    new, old_output = late_writer(tmp_path, str(tmp_path / "out"), layout=2)
    first, second = (unit.unit_id for unit in new.units)
    assert old_output.commit_unit(first, ROWS, UnitLedger(rows=2), writer="late")
    assert new.output.committed_units() == set()
    assert new.output.commit_unit(first, ROWS, UnitLedger(rows=7), writer="ours")
    assert new.output.committed_units() == {first}
    (footer,) = new.output.footers([first])
    assert (footer.ledger.rows, footer.run_id) == (7, new.manifest.run_id)
    (foreign,) = new.output.foreign_objects([first, second])
    assert f"{first}.parquet" in foreign
    assert new.manifest.run_id not in foreign


@pytest.mark.parametrize("says", VOICES)
def test_in_an_output_of_an_earlier_version_a_unit_of_another_run_is_named(
    tmp_path: Path, says: str
) -> None:
    """Names were the same in every run then. A unit of that version names its run in its rows."""
    new, _ = late_writer(tmp_path, str(tmp_path / "out"), layout=1)
    first, second = (unit.unit_id for unit in new.units)
    store = open_store(new.output.uri)
    output = RunOutput(store, UnitNames(run_id=new.manifest.run_id, layout=1))
    output.commit_unit(second, ROWS, UnitLedger(rows=2), writer="ours")
    assert output.committed_units() == {second}
    rows = ROWS.append_column("run_id", [["older"] * 2])
    run_id = "older" if says == "footer" else None
    footer = UnitFooter(ledger=UnitLedger(rows=2), run_id=run_id, unit_id=None)
    store.put(f"{first}.parquet", write_unit_file(rows, footer))
    message = rf"{first}\.parquet: a unit of run older where .* remove the object and resume"
    with pytest.raises(StoreError, match=message):
        output.committed_units()
    with pytest.raises(StoreError, match=message):
        output.ledgers([first])


def commit_three(store: Store, says: str) -> tuple[RunOutput, list[str]]:
    """Three units, which say which they are in their footers, or in their rows alone."""
    output, names = RunOutput(store, UnitNames(run_id="run")), ["u0", "u1", "u2"]
    for name in names:
        footer = UnitFooter(
            ledger=UnitLedger(rows=2), run_id="run", unit_id=name if says == "footer" else None
        )
        rows = ROWS if says == "footer" else ROWS.append_column("unit_id", [[name] * 2])
        store.put(f"run-{name}.parquet", write_unit_file(rows, footer))
    return output, names


@settings(max_examples=40)
@given(lying=st.lists(st.integers(0, 2), min_size=3, max_size=3), says=st.sampled_from(VOICES))
def test_a_unit_counts_under_its_own_name_alone(lying: list[int], says: str) -> None:
    """Whichever unit's object is copied to whichever name: one that is not its own is named."""
    with TemporaryDirectory() as folder:
        store = open_store(folder)
        output, names = commit_three(store, says)
        contents = [store.get(f"run-{name}.parquet") for name in names]
        for name, other in zip(names, lying, strict=True):
            store.put(f"run-{name}.parquet", contents[other])
        for number, name in enumerate(names):
            if lying[number] == number:
                assert output.ledgers([name]) == [UnitLedger(rows=2)]
                continue
            message = rf"run-{name}\.parquet: it holds unit u{lying[number]} .* remove the object"
            for read in (output.ledgers, output.footers):
                with pytest.raises(StoreError, match=message):
                    read([name])
            with pytest.raises(StoreError, match=message):
                output.open_unit(name)


def test_a_unit_that_does_not_say_which_it_is_is_read_as_before(store: Store) -> None:
    footer = UnitFooter(ledger=UnitLedger(rows=2), run_id="run", unit_id=None)
    store.put("run-u1.parquet", write_unit_file(ROWS, footer))
    output = RunOutput(store, UnitNames(run_id="run"))
    assert output.footers(["u1"]) == [footer]


def test_a_finished_run_with_one_unit_twice_is_not_reported_as_whole(tmp_path: Path) -> None:
    planned = run_of(tmp_path, f"{tmp_path}/out", "p")
    for unit in planned.units:
        planned.output.commit_unit(unit.unit_id, ROWS, UnitLedger(rows=2), writer="w")
    summarise(planned.output)
    first, second = (planned.output._names.key(unit.unit_id) for unit in planned.units)
    store = open_store(planned.output.uri)
    store.put(second, store.get(first))
    with pytest.raises(StoreError, match=rf"{second}: it holds unit {planned.units[0].unit_id}"):
        summarise(planned.output)
    (tmp_path / "out" / second).unlink()
    assert summarise(planned.output).state == "incomplete", "which the same command resumes"


def test_what_readers_of_the_prefix_would_read_beside_the_rows_is_listed(
    output: RunOutput, store: Store
) -> None:
    output.commit_unit("u1", ROWS, UnitLedger(rows=2), writer="w")
    output.commit_unit("u2", ROWS, UnitLedger(rows=2), writer="w")
    hidden = ["_run/summary.json", "_SUCCESS", ".hidden", "folder/_x/a.parquet"]
    seen = ["u1.parquet", "other-u1.parquet", "folder/run-u1.parquet", "notes.txt"]
    for key in hidden + seen:
        store.put(key, b"x")
    expected = {store.uri_of(key) for key in [*seen, "run-u2.parquet"]}
    assert set(output.foreign_objects({"u1"})) == expected


# The manifest: whatever is in its place is read, or named.


@settings(max_examples=40)
@given(data=st.data())
def test_a_damaged_manifest_is_named_or_harmless(data: st.DataObject) -> None:
    """Any part of it missing or of another type: a StoreError, or a report."""
    with TemporaryDirectory() as folder:
        planned = run_of(Path(folder), f"{folder}/out", "describe")
        store = open_store(planned.output.uri)
        record = json.loads(store.get("_run/manifest.json"))
        place: Any = record
        while isinstance(place, dict | list) and place:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = data.draw(st.sampled_from(list(keys)))
            if not isinstance(place[key], dict | list) or data.draw(st.booleans()):
                break
            place = place[key]
        if not place:
            return
        odd: list[Any] = [None, 3, "x", [], {}, {"a": 1}, [1], True]
        if isinstance(place, dict) and data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(st.sampled_from(odd))
        store.put("_run/manifest.json", json.dumps(record).encode())
        told = None
        try:
            assert render(summarise(RunOutput(store)))
        except StoreError as error:
            told = str(error)
        assert told is None or "_run/manifest.json" in told


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b'{"a": 1}', b"\xff\xfe", b"null"])
def test_what_is_no_manifest_is_named(store: Store, content: bytes) -> None:
    store.put("_run/manifest.json", content)
    with pytest.raises(StoreError, match=r"_run/manifest\.json: not a manifest .* restore it"):
        RunOutput(store).require_manifest()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 7),
        ("model", None),
        ("spec", {"method": "sppruner", "budget": {"ratio": 7}}),
        ("spec", 3),
    ],
)
def test_a_manifest_with_settings_of_another_type_is_named(
    tmp_path: Path, name: str, value: object
) -> None:
    planned = run_of(tmp_path, f"{tmp_path}/out", "describe")
    store = open_store(planned.output.uri)
    record = json.loads(store.get("_run/manifest.json"))
    record["settings"][name] = value
    store.put("_run/manifest.json", json.dumps(record).encode())
    with pytest.raises(StoreError, match="not a manifest"):
        RunOutput(store).require_manifest()


def test_a_manifest_of_a_later_layout_is_named(tmp_path: Path) -> None:
    planned = run_of(tmp_path, f"{tmp_path}/out", "describe")
    store = open_store(planned.output.uri)
    record = json.loads(store.get("_run/manifest.json"))
    record["layout"] = 99
    store.put("_run/manifest.json", json.dumps(record).encode())
    with pytest.raises(StoreError, match="not a manifest"):
        RunOutput(store).require_manifest()


def test_a_version_that_knows_layout_one_alone_cannot_read_the_manifest(tmp_path: Path) -> None:
    """It would see no committed unit, and write each a second time."""
    planned = run_of(tmp_path, f"{tmp_path}/out", "describe")
    record = json.loads(planned.manifest.to_json())
    with pytest.raises(TypeError):
        ColumnMapping.from_dict(record["layout"])


def test_a_unit_that_is_replaced_while_it_is_read_is_read_again(
    output: RunOutput, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.commit_unit("u1", ROWS, UnitLedger(rows=2), writer="w")
    newer = write_unit_file(ROWS, UnitFooter(ledger=UnitLedger(rows=9), run_id="run", unit_id="u1"))
    head, calls = store.head, []

    def head_and_replace(key: str) -> ObjectInfo | None:
        info = head(key)
        calls.append(key)
        if len(calls) == 1:
            store.put(key, newer)
        return info

    monkeypatch.setattr(store, "head", head_and_replace)
    assert output.ledgers(["u1"]) == [UnitLedger(rows=9)]


def test_a_unit_that_is_replaced_at_every_read_is_named(
    output: RunOutput, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.commit_unit("u1", ROWS, UnitLedger(rows=2), writer="w")

    def gone(*_: object, **__: object) -> bytes:
        raise ObjectGone("replaced")

    monkeypatch.setattr(store, "get_range", gone)
    with pytest.raises(StoreError, match=r"u1\.parquet: replaced 8 times"):
        output.ledgers(["u1"])


@pytest.mark.parametrize("broken", ["head", "get_range"])
def test_a_store_that_does_not_answer_holds_no_other_run(tmp_path: Path, broken: str) -> None:
    """A run is refused, or begun anew, where its manifest is absent or another: not where one
    request failed."""

    class Silent(LocalStore):
        pass

    def fail(*args: object, **more: object) -> None:
        raise StoreError("no answer")

    store = LocalStore(tmp_path)
    assert RunOutput(store).manifest_head() is None
    store.put("_run/manifest.json", b'{"run_id": "a"}')
    assert RunOutput(store).manifest_head() == b'{"run_id": "a"}'
    setattr(Silent, broken, fail)
    with pytest.raises(StoreError, match="no answer"):
        RunOutput(Silent(tmp_path)).manifest_head()


def test_a_manifest_that_goes_while_it_is_read_is_none(tmp_path: Path) -> None:
    class Emptied(LocalStore):
        def get_range(self, *args: object, **more: object) -> bytes:
            raise ObjectGone("removed")

    Emptied(tmp_path).put("_run/manifest.json", b"{}")
    assert RunOutput(Emptied(tmp_path)).manifest_head() is None
