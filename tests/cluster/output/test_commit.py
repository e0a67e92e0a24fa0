"""The commit: complete and checked units only, one object each, under concurrent writers."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ray.data.datasource import WriteResult
from structlog.testing import capture_logs

from cluster.accounting.ledger import RunLedger, UnitLedger
from cluster.config import Kind, MediaLimits
from cluster.corpus.packed import pack_unit, unpack_units
from cluster.corpus.source import read_unit, read_units
from cluster.corpus.unit import Format, Unit
from cluster.errors import CommitRefused, ErrorShareExceeded, RowError, StoreError
from cluster.images import decode_image
from cluster.output.commit import CommitOutcome, CommitSink, commit_unit
from cluster.output.run_output import RunOutput
from cluster.output.unit_file import UnitFooter, write_unit_file
from cluster.output.unit_names import UnitNames
from cluster.schema import PLANNED_FIELD, UNIT_FIELD, is_internal, output_schema
from cluster.store import Store, open_store
from jobs.make_corpus import make_corpus
from tests.cluster.corpora import Planned, plan, put_parquet
from tests.cluster.fake_engine import picture
from tests.cluster.labelled_tables import EXPECTED, SPEC, mask, row, table
from tests.cluster.nested_types import MARK, can_be_read, nested_types, values_of

COMPLETE = table(row(2), row(0), row(1))
NAMES = UnitNames(run_id="run")


@pytest.fixture
def store(s3: str) -> Store:
    return open_store(f"{s3}/out")


def commit(committed: pa.Table, store: Store, writer: str = "w", **options: Any) -> bool:
    output = RunOutput(store, NAMES)
    return commit_unit(committed, expected=EXPECTED, output=output, writer=writer, **options).won


def test_a_unit_becomes_one_object_in_row_order_without_internal_columns(store: Store) -> None:
    assert commit(COMPLETE, store)
    assert [info.key for info in store.list()] == ["run-unit.parquet"]
    read = pq.read_table(io.BytesIO(store.get("run-unit.parquet")))
    assert read["unit_row"].to_pylist() == [0, 1, 2]
    assert read["note"].to_pylist() == ["n0", "n1", "n2"]
    assert not any(is_internal(name) for name in read.column_names)
    assert read.schema.remove_metadata() == output_schema(EXPECTED.source_schema, EXPECTED.kind)


def test_the_ledger_is_in_the_parquet_footer(store: Store) -> None:
    commit(COMPLETE, store)
    (ledger,) = RunOutput(store, NAMES).ledgers(["unit"])
    assert (ledger.rows, ledger.visual_tokens, ledger.visual_tokens_kept) == (3, 300, 75)
    footer = pq.read_metadata(io.BytesIO(store.get("run-unit.parquet"))).metadata
    assert UnitLedger.from_json(footer[b"sppruner.ledger"]) == ledger
    assert (footer[b"sppruner.run"], footer[b"sppruner.unit"]) == (b"run", b"unit")


def test_the_second_writer_loses_without_an_error_and_changes_nothing(store: Store) -> None:
    assert commit(COMPLETE, store, "first")
    slower = table(row(0, seconds=9.0), row(1), row(2))
    assert not commit(slower, store, "second")
    (ledger,) = RunOutput(store, NAMES).ledgers(["unit"])
    assert ledger.seconds == pytest.approx(1.5)


def test_a_race_lost_to_another_run_s_object_is_an_error(store: Store) -> None:
    """Its rows are not ours: the unit would count as done without them."""
    footer = UnitFooter(ledger=UnitLedger(rows=3), run_id="older", unit_id=None)
    store.put("run-unit.parquet", write_unit_file(COMPLETE, footer))
    with pytest.raises(StoreError, match=r"run-unit\.parquet: a unit of run older"):
        commit(COMPLETE, store)


def test_of_racing_writers_one_wins_and_all_report_the_committed_ledger(store: Store) -> None:
    reported: list[tuple[str, UnitLedger]] = []

    def attempt(number: int) -> bool:
        timed = table(row(0, seconds=float(number)), row(1), row(2))
        return commit(timed, store, f"w{number}", on_commit=lambda *event: reported.append(event))

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(attempt, range(6))) == 1
    (ledger,) = RunOutput(store, NAMES).ledgers(["unit"])
    assert set(map(str, reported)) == {str(("unit", ledger))}
    assert len(reported) == 6


@pytest.mark.parametrize(
    "refused", [table(row(0), row(1)), table(row(0), row(1), row(2, text=None))]
)
def test_a_refused_unit_writes_no_object(store: Store, refused: pa.Table) -> None:
    with pytest.raises(CommitRefused):
        commit(refused, store)
    assert store.list() == []


def test_the_mask_of_kept_tokens_is_committed_bit_for_bit(store: Store) -> None:
    error = {"text": None, "kept_tokens": None, "error_code": "image_missing"}
    assert commit(table(row(0, **error), row(1), row(2)), store)
    assert RunOutput(store, NAMES).ledgers(["unit"])[0].failed == {"image_missing": 1}
    read = pq.read_table(io.BytesIO(store.get("run-unit.parquet")))
    assert read["kept_tokens"].to_pylist() == [None, mask(25, 100), mask(25, 100)]


def test_missing_and_unknown_columns_are_refused_by_name(store: Store) -> None:
    with pytest.raises(CommitRefused, match=r"missing \['note'\], unknown \['extra'\]"):
        commit(COMPLETE.rename_columns(["extra", *COMPLETE.column_names[1:]]), store)


REQUIRED = pa.struct([pa.field("a", pa.int8(), nullable=False)])


@pytest.mark.parametrize(
    ("kind", "values"),
    [(pa.int8(), pa.array([1, 300, None])), (REQUIRED, pa.nulls(3, REQUIRED))],
)
def test_a_value_that_its_column_cannot_have_is_refused_with_unit_and_column(
    store: Store, kind: pa.DataType, values: pa.Array
) -> None:
    expected = dataclasses.replace(EXPECTED, source_schema=pa.schema([("note", kind)]))
    unfit = COMPLETE.set_column(COMPLETE.column_names.index("note"), "note", values)
    with pytest.raises(CommitRefused, match="unit unit: column 'note' cannot be committed"):
        commit_unit(unfit, expected=expected, output=RunOutput(store, NAMES), writer="w")
    assert store.list() == []


# From a corpus to committed units, without Ray.


def labelled(table: pa.Table, *, run_id: str, kind: Kind) -> pa.Table:
    """A stand-in for the labeller: decodes each image; its text is the image's width."""
    rows = []
    for values in table.to_pylist():
        output = {"attempts": 1, "is_control": False, "run_id": run_id, "model": "m"}
        output |= {"key": values["_in_key"]}
        output |= {name: values[name] for name in (UNIT_FIELD.name, PLANNED_FIELD.name)}
        output |= {"unit_id": values["_in_unit"], "unit_row": values["_in_row"]}
        output |= {f"error_{n}": values[f"_in_error_{n}"] for n in ("code", "message", "stage")}
        if output["error_code"] is None:
            try:
                image = decode_image(values["_in_image"], MediaLimits())
                output |= {"text": f"{image.width}", "visual_tokens": 8, "visual_tokens_kept": 2}
                output |= {"kept_tokens": mask(2, 8)}
                output |= {"prune_method": SPEC.method, "prune_spec": SPEC.to_json()}
            except RowError as error:
                output |= {"error_code": error.code, "error_stage": error.stage}
        source = {name: value for name, value in values.items() if not is_internal(name)}
        vqa = {"question": values["_in_prompt"], "answer": None} if kind == "vqa" else {}
        rows.append({**source, **output, **vqa})
    source_schema = pa.schema([field for field in table.schema if not is_internal(field.name)])
    fields = [*output_schema(source_schema, kind), UNIT_FIELD, PLANNED_FIELD]
    schema = pa.schema(fields)
    return pa.Table.from_pylist(rows, schema=schema)


@pytest.fixture
def local_run(tmp_path: Path) -> Planned:
    """Three units of four, four and two rows, on a local store."""
    images = pa.array([picture(number) for number in range(10)], pa.binary())
    put_parquet(open_store(f"{tmp_path}/in"), "a.parquet", pa.table({"image": images}))
    return plan(f"{tmp_path}/in", f"{tmp_path}/out", spec=SPEC, unit_rows=4)


def label_units(planned: Planned) -> list[pa.Table]:
    """The labelled rows of each unit, in the order of the manifest."""
    store, mapping = open_store(planned.manifest.source), planned.manifest.mapping
    return [
        labelled(read_unit(store, unit, mapping), run_id=planned.manifest.run_id, kind="caption")
        for unit in planned.units
    ]


def test_every_unit_of_every_block_is_committed(local_run: Planned) -> None:
    first, *others = label_units(local_run)
    sink = CommitSink(*local_run)
    outcomes = sink.write([pack_unit(first), pa.concat_tables(map(pack_unit, others))], None)
    assert [(o.unit_id, o.rows, o.won) for o in outcomes] == [
        (unit.unit_id, unit.row_count, True) for unit in local_run.units
    ]
    assert sink.get_name() == "Commit"
    assert local_run.output.committed_units() == {unit.unit_id for unit in local_run.units}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rows_that_lack_values_of_a_nested_column_are_committed_whatever_its_type_requires(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Rows that cannot be read, files without the column or without a field of it, texts that are
    not UTF-8: all have nulls where the files of the corpus have none."""
    folder = tmp_path_factory.mktemp("nested")
    corpus, images = open_store(str(folder / "in")), {"image": [picture(1)] * 3}
    field = pa.field("x", data.draw(nested_types()), nullable=data.draw(st.booleans()))
    more = pa.field("y", data.draw(nested_types(depth=2)), nullable=False)
    values = data.draw(st.lists(values_of(field), min_size=3, max_size=3))
    others = data.draw(st.lists(values_of(more), min_size=3, max_size=3))
    alone = pa.array([{"x": value} for value in values], pa.struct([field]))
    both = [{"x": x, "y": y} for x, y in zip(values, others, strict=True)]
    together = pa.array(both, pa.struct([field, more]))
    assume(can_be_read(pa.table({"alone": alone, "together": together})))
    for name, columns in {
        "a": {"nested": alone},
        "b": {"nested": together},
        "c": {},
        "d": {"nested": together},
    }.items():
        put_parquet(corpus, f"{name}.parquet", pa.table(images | columns), compression="none")
        plain = corpus.get(f"{name}.parquet")
        corpus.put(f"{name}.parquet", plain.replace(MARK.encode(), b"\xff\xff"))
    planned = plan(corpus.uri, str(folder / "out"), spec=SPEC)
    corpus.put("d.parquet", b"another file by now")
    CommitSink(*planned).write(map(pack_unit, label_units(planned)), None)

    expected = [{"x": value, "y": None} for value in values] + both
    assert pq.read_table(planned.output.uri)["nested"].to_pylist() == [
        *(None if MARK in str(value) else value for value in expected),
        *[None] * 6,
    ]


def test_a_unit_that_lacks_rows_is_refused(local_run: Planned) -> None:
    complete, incomplete, _ = label_units(local_run)
    blocks = [pack_unit(complete), pack_unit(incomplete.slice(0, 3))]
    with pytest.raises(CommitRefused, match="has 3 rows"):
        CommitSink(*local_run).write(blocks, None)
    assert local_run.output.committed_units() == {local_run.units[0].unit_id}


def test_units_with_error_rows_are_committed_until_the_run_should_stop(local_run: Planned) -> None:
    first, second, third = label_units(local_run)
    column = second.column_names.index("error_code")
    failed = second.set_column(column, "error_code", pa.array(["read_failed"] + [None] * 3))
    asked: list[bool] = []

    def ask() -> str | None:
        asked.append(True)
        return "too many" if len(asked) > 1 else None

    sink = CommitSink(*local_run, stop_reason=ask)
    blocks = [pack_unit(table) for table in (first, failed, third)]
    assert len(sink.write(blocks, None)) == 3
    with pytest.raises(ErrorShareExceeded, match="too many"):
        sink.write(blocks, None)
    assert len(asked) == 2, "units without error rows need no question"


def test_the_end_of_a_write_logs_commits_and_lost_races(local_run: Planned) -> None:
    sink = CommitSink(*local_run)
    blocks = [pack_unit(table) for table in label_units(local_run)]
    first, second = sink.write(blocks[:1], None), sink.write(blocks, None)
    result = WriteResult(num_rows=14, size_bytes=0, write_returns=[first, second])
    with capture_logs() as events:
        sink.on_write_complete(result)
    (event,) = events
    assert (event["event"], event["committed"], event["lost_races"]) == ("write_complete", 3, 1)


# The tests below run on a real Ray, from a corpus on S3 to committed units.


class RecordingSink(CommitSink):
    """A sink that records its outcomes."""

    outcomes: list[CommitOutcome]

    def on_write_complete(self, write_result: WriteResult[list[CommitOutcome]]) -> None:
        super().on_write_complete(write_result)
        self.outcomes = [outcome for part in write_result.write_returns for outcome in part]


def label(planned: Planned, units: Sequence[Unit], sink: CommitSink) -> None:
    """Labels and commits units on Ray Data."""
    manifest = planned.manifest

    def stage(block: pa.Table) -> pa.Table:
        (table,) = unpack_units(block)
        return pack_unit(labelled(table, run_id=manifest.run_id, kind=manifest.kind))

    dataset = read_units(manifest.source, manifest.mapping, units)
    dataset.map_batches(stage, batch_size=None, batch_format="pyarrow").write_datasink(sink)


def run(planned: Planned, units: Sequence[Unit]) -> RecordingSink:
    """What a job does with units that are not committed."""
    sink = RecordingSink(*planned)
    label(planned, units, sink)
    return sink


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("format", "kind"), [("parquet", "caption"), ("webdataset", "vqa")])
def test_every_row_of_a_corpus_with_faults_is_committed_exactly_once(
    s3: str, format: Format, kind: Kind
) -> None:
    faults = make_corpus(kind=kind, rows=260, output=f"{s3}/in", format=format, faults=True)
    planned = plan(f"{s3}/in", f"{s3}/out", kind=kind, spec=SPEC, unit_rows=40)
    store = open_store(planned.output.uri)

    # A part of the run is committed already, as after a killed driver.
    first = planned.units[:2]
    assert {o.unit_id for o in run(planned, first).outcomes} == {u.unit_id for u in first}
    before = {info.key: info.etag for info in store.list(suffixes=(".parquet",))}

    resumed = plan(f"{s3}/in", f"{s3}/out", kind=kind, spec=SPEC, unit_rows=40)
    assert resumed.manifest == planned.manifest
    done = planned.output.committed_units()
    sink = run(resumed, [unit for unit in resumed.units if unit.unit_id not in done])
    assert len(sink.outcomes) == len(planned.units) - 2
    assert all(outcome.won for outcome in sink.outcomes)
    after = {info.key: info.etag for info in store.list(suffixes=(".parquet",))}
    assert before.items() <= after.items()

    # As a user reads it: from its address, with the AWS_* variables.
    read = pq.read_table(planned.output.uri)
    expected = {(unit.unit_id, n) for unit in planned.units for n in range(unit.row_count)}
    positions = list(zip(read["unit_id"].to_pylist(), read["unit_row"].to_pylist(), strict=True))
    assert len(positions) == len(set(positions))
    assert set(positions) == expected

    starts = {unit.unit_id: unit.row_start for unit in planned.units}
    by_row = {starts[row["unit_id"]] + row["unit_row"]: row for row in read.to_pylist()}
    fault_by_row = {fault.row: fault for fault in faults}
    assert len(by_row) == 260 + (format == "webdataset")
    for number, found in by_row.items():
        fault = fault_by_row.get(number)
        assert found["error_code"] == (fault.error_code if fault else None)
        assert found["text"] == (None if found["error_code"] else "192")
        assert fault is None or fault.key == found["key"]
        assert kind == "caption" or bool(found["question"]) != (
            found["error_code"] in ("prompt_invalid", "archive_truncated")
        )

    ledger = RunLedger.of(planned.output.ledgers(planned.output.committed_units()))
    counted = Counter(fault.error_code for fault in faults if fault.error_code)
    assert ledger.units == len(planned.units)
    assert ledger.total.rows == len(by_row)
    assert ledger.total.failed == counted


@pytest.mark.usefixtures("local_ray")
def test_a_unit_that_is_written_again_is_a_lost_race_and_not_a_second_copy(s3: str) -> None:
    """Ray reruns a write whose result it lost, and the unit is committed already."""
    make_corpus(kind="caption", rows=30, output=f"{s3}/in")
    planned = plan(f"{s3}/in", f"{s3}/out", spec=SPEC, unit_rows=10)
    assert [outcome.won for outcome in run(planned, planned.units).outcomes] == [True] * 3
    assert [outcome.won for outcome in run(planned, planned.units).outcomes] == [False] * 3
    assert len(open_store(planned.output.uri).list(suffixes=(".parquet",))) == 3


@pytest.mark.usefixtures("local_ray")
def test_a_refused_unit_stops_the_run_with_its_reason(s3: str) -> None:
    make_corpus(kind="caption", rows=20, output=f"{s3}/in")
    planned = plan(f"{s3}/in", f"{s3}/out", spec=SPEC, unit_rows=10)
    identity = dataclasses.replace(planned.manifest.identity, settings={"kind": "caption"})
    stale = dataclasses.replace(planned.manifest, identity=identity)
    with pytest.raises(CommitRefused, match="other runs"):
        label(planned, planned.units, CommitSink(stale, planned.output))
    assert planned.output.committed_units() == set()
