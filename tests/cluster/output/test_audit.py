"""The audit: an output that a run wrote has no differences, and what is changed in it is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.ledger import UnitLedger, unit_ledger
from cluster.accounting.speedup import Block
from cluster.errors import UsageError
from cluster.output.audit import Audit, audit
from cluster.output.checks import ExpectedUnits
from cluster.output.commit import commit_unit
from cluster.output.run_output import RunOutput
from cluster.output.summary import keep_summary, summarise
from cluster.output.unit_file import Retry, has_written_rows, write_unit_file
from cluster.schema import PLANNED_FIELD, UNIT_FIELD, output_schema
from cluster.store import open_store
from sppruner.cost import PARTS
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.cluster.corpora import Planned, plan, put_parquet
from tests.cluster.labelled_tables import mask

SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.25))
UNITS, ROWS, MEASURED = 8, 4, range(1, 7)
STEADY = ("steady_seconds", "control_steady_seconds")
Row = dict[str, Any]


def answer(planned: Planned, unit: int, number: int, spec: PruneSpec = SPEC) -> Row:
    kept = 100 if spec.is_dense else 25
    made = {
        "key": f"k{unit}-{number}",
        "text": f"text {number}",
        "answer": f"text {number}",
        "attempts": 1,
        "finish_reason": "stop",
        "prompt_tokens": kept + 7,
        "completion_tokens": 5,
        "visual_tokens": 100,
        "visual_tokens_kept": kept,
        "kept_tokens": mask(kept, 100),
        "prune_method": spec.method,
        "prune_spec": spec.to_json(),
        "seconds": 0.25 + number / 64,
        "is_control": unit in MEASURED,
        "control_text": f"text {number % 3}" if unit in MEASURED else None,
        "control_seconds": 0.75 + number / 32 + unit / 16 if unit in MEASURED else None,
        "steady_seconds": 0.25 + number / 64 if unit in MEASURED and number % 3 else None,
        "control_steady_seconds": 0.75 + unit / 16 if unit in MEASURED and number % 2 else None,
        "discarded_seconds": 0.125,
        "device": "cpu",
        "flops": dict.fromkeys(PARTS, 9 + number if spec.is_dense else 3 + number),
        "flops_dense": dict.fromkeys(PARTS, 9 + number),
        "flops_cached": dict.fromkeys(PARTS, 0) | {"vision": number % 2},
        "kv_bytes": 44 if spec.is_dense else 11,
        "kv_bytes_dense": 44,
        "model": "m",
        "model_revision": "r1",
        "run_id": planned.manifest.run_id,
        "unit_id": planned.units[unit].unit_id,
        "unit_row": number,
        "_in_unit": planned.units[unit].unit_id,
        "_in_unit_rows": ROWS,
    }
    if (unit, number) == (7, 3):
        lost = dict.fromkeys(set(made) & {name for name in made if name not in _OF_EVERY_ROW})
        error = {"error_code": "image_missing", "error_message": "none", "error_stage": "decode"}
        return made | lost | error
    return made


_OF_EVERY_ROW = {"key", "attempts", "is_control", "discarded_seconds", "model", "model_revision",
                 "run_id", "unit_id", "unit_row", "_in_unit", "_in_unit_rows"}  # fmt: skip


def run(folder: Path, spec: PruneSpec = SPEC, **settings: Any) -> Planned:
    """A whole run, as its sink and its command write it."""
    images = pa.array([b"%d" % n for n in range(UNITS * ROWS)], pa.binary())
    corpus = {"image": images, "question": ["what is it?"] * len(images)}
    put_parquet(open_store(f"{folder}/in"), "a.parquet", pa.table(corpus))
    planned = plan(f"{folder}/in", f"{folder}/out", spec=SPEC, unit_rows=ROWS, **settings)
    expected = ExpectedUnits.of(planned.manifest)
    schema = output_schema(expected.source_schema, expected.kind)
    for unit in range(UNITS):
        rows = [answer(planned, unit, number, spec) for number in range(ROWS)]
        table = pa.Table.from_pylist(rows, pa.schema([*schema, UNIT_FIELD, PLANNED_FIELD]))
        commit_unit(table, expected=expected, output=planned.output, writer=f"w{unit}")
    return planned


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    made = run(tmp_path)
    keep_summary(made.output, summarise(made.output))
    return made


def look(planned: Planned) -> Audit:
    return audit(RunOutput.open(planned.output.uri))


def path(planned: Planned, unit: int) -> Path:
    (found,) = Path(planned.output.uri).glob(f"*-{planned.units[unit].unit_id}.parquet")
    return found


def rewrite(planned: Planned, unit: int, change: Callable[[list[Row]], list[Row]]) -> None:
    """Changes rows as somebody with pyarrow does: footer and digest stay as they were."""
    place = path(planned, unit)
    table = pq.read_table(place)
    rows = pa.Table.from_pylist(change(table.to_pylist()), table.schema)
    pairs = pq.read_metadata(place).metadata
    with pq.ParquetWriter(place, table.schema) as writer:
        writer.write_table(rows)
        writer.add_key_value_metadata({k: v for k, v in pairs.items() if k.startswith(b"sppruner")})


def forge(planned: Planned, unit: int, change: Callable[[list[Row]], list[Row]]) -> None:
    """Changes rows and writes a digest that fits, with the ledger as it was."""
    found = planned.output.open_unit(planned.units[unit].unit_id)
    rows = pa.Table.from_pylist(change(found.table.to_pylist()), found.table.schema)
    path(planned, unit).write_bytes(write_unit_file(rows, found.footer))


def refooter(planned: Planned, unit: int, name: str, value: Any) -> None:
    """Changes the ledger and leaves the rows, with a digest that fits."""
    found = planned.output.open_unit(planned.units[unit].unit_id)
    ledger = json.loads(found.footer.ledger.to_json()) | {name: value}
    footer = replace(found.footer, ledger=UnitLedger.from_json(json.dumps(ledger)))
    path(planned, unit).write_bytes(write_unit_file(found.table, footer))


def agree(planned: Planned, unit: int, change: Callable[[list[Row]], list[Row]]) -> None:
    """Changes rows, and writes digest, ledger and summary that fit."""
    found = planned.output.open_unit(planned.units[unit].unit_id)
    rows = pa.Table.from_pylist(change(found.table.to_pylist()), found.table.schema)
    footer = replace(found.footer, ledger=unit_ledger(rows))
    path(planned, unit).write_bytes(write_unit_file(rows, footer))
    keep_summary(planned.output, summarise(planned.output))


def replan(planned: Planned, change: Callable[[list[Any]], list[Any]]) -> None:
    """Changes the units of the manifest, with a summary that fits."""
    place = Path(planned.output.uri) / "_run/manifest.json"
    record = json.loads(place.read_text())
    place.write_text(json.dumps(record | {"units": change(record["units"])}))
    output = RunOutput.open(planned.output.uri)
    keep_summary(output, summarise(output))


def without_unit(planned: Planned, unit: int) -> None:
    path(planned, unit).unlink()
    replan(planned, lambda units: [*units[:unit], *units[unit + 1 :]])


def refooter_raw(planned: Planned, unit: int, name: str, value: Any) -> None:
    """Writes what no ledger has."""
    place = path(planned, unit)
    table = pq.read_table(place)
    pairs = dict(pq.read_metadata(place).metadata)
    ledger = json.loads(pairs[b"sppruner.ledger"])
    pairs[b"sppruner.ledger"] = json.dumps(ledger | {name: value} if name else value).encode()
    with pq.ParquetWriter(place, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({k: v for k, v in pairs.items() if k.startswith(b"sppruner")})


def resummarise(planned: Planned, *names: str, value: Any) -> None:
    place = Path(planned.output.uri) / "_run/summary.json"
    told = json.loads(place.read_text())
    part = told
    for name in names[:-1]:
        part = part[name]
    part[names[-1]] = value
    place.write_text(json.dumps(told))


def claim_rows_unknown(planned: Planned) -> None:
    resummarise(planned, "rows", value=13)
    resummarise(planned, "unavailable", value={"rows": "too many"})


def cut_off(planned: Planned, *numbers: int) -> None:
    for number in sorted(numbers, reverse=True):
        without_unit(planned, number)


def set_row(number: int, **values: Any) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [row | values if row["unit_row"] == number else row for row in rows]


def test_what_a_run_wrote_has_no_difference(planned: Planned) -> None:
    found = look(planned)
    assert (found.units, found.rows, found.differences) == (UNITS, UNITS * ROWS, ())


TAMPERED: dict[str, tuple[str, Callable[[Planned], object]]] = {
    "a text, by hand": ("not the bytes", lambda p: rewrite(p, 0, set_row(1, text="other"))),
    "a byte of the rows": (
        "",
        lambda p: path(p, 0).write_bytes(
            (data := bytearray(path(p, 0).read_bytes()))[:40] + bytes([data[40] ^ 1]) + data[41:]
        ),
    ),
    "seconds of a row": ("nanoseconds", lambda p: forge(p, 0, set_row(1, seconds=0.001))),
    "negative seconds": ("seconds are negative", lambda p: forge(p, 0, set_row(1, seconds=-1.0))),
    "dense seconds of a control row": (
        "blocks",
        lambda p: forge(p, 1, set_row(1, control_steady_seconds=9.0)),
    ),
    "pruned seconds of a control row": (
        "blocks",
        lambda p: forge(p, 1, set_row(1, steady_seconds=0.001)),
    ),
    "what a block cost": (
        "control_nanoseconds",
        lambda p: forge(p, 1, set_row(0, control_seconds=9.0)),
    ),
    "a block whose dense arm has no steady part": (
        "no row of its block has control_steady_seconds",
        lambda p: forge(p, 1, lambda rows: [r | {"control_steady_seconds": None} for r in rows]),
    ),
    "a place in the steady part outside a block": (
        "none to have",
        lambda p: forge(p, 0, set_row(0, steady_seconds=1.0)),
    ),
    "a control row without its twin's text": (
        "its dense twin is incomplete",
        lambda p: forge(p, 1, set_row(0, control_text=None)),
    ),
    "a twin outside a block": (
        "none to have",
        lambda p: forge(p, 0, set_row(0, control_text="x", control_seconds=1.0)),
    ),
    "seconds that are no number, in rows and ledgers": (
        "cannot be read",
        lambda p: forge(p, 0, set_row(0, seconds=float("nan"))),
    ),
    "infinite seconds of a twin": (
        "cannot be read",
        lambda p: forge(p, 1, set_row(0, control_seconds=float("inf"))),
    ),
    "a steady part of no number": (
        "not finite",
        lambda p: agree(p, 0, set_row(0, steady_seconds=float("nan"))),
    ),
    "a saving three times as large, in rows, ledger and summary": (
        "the control_steady_seconds of its block are",
        lambda p: agree(
            p,
            1,
            lambda rows: [
                row | {"control_steady_seconds": 3 * (row["control_steady_seconds"] or 0)}
                for row in rows
            ],
        ),
    ),
    "slow rows that are no longer in their block": (
        "not of rows one after the other",
        lambda p: agree(
            p,
            1,
            set_row(
                1,
                is_control=False,
                control_text=None,
                control_seconds=None,
                steady_seconds=None,
                control_steady_seconds=None,
            ),
        ),
    ),
    "a block of one row": (
        "1 of the 4 rows of its block",
        lambda p: agree(
            p,
            1,
            lambda rows: [
                row
                | (
                    {"steady_seconds": 0.1, "control_steady_seconds": 0.5}
                    if row["unit_row"] == 1
                    else {
                        "control_text": None,
                        "control_seconds": None,
                        "steady_seconds": None,
                        "control_steady_seconds": None,
                    }
                )
                for row in rows
            ],
        ),
    ),
    "a cost of measuring below nothing": (
        "seconds are negative",
        lambda p: agree(p, 1, set_row(0, discarded_seconds=-7.0)),
    ),
    "an error row's cost below nothing": (
        "seconds are negative",
        lambda p: agree(p, 7, set_row(3, discarded_seconds=-7.0)),
    ),
    "more in caches than there is": (
        "caches spared more",
        lambda p: agree(p, 0, set_row(1, flops_cached=dict.fromkeys(PARTS, 99))),
    ),
    "a dense row with a dense cost of its own": (
        "dense cost is another",
        lambda p: agree(
            p,
            0,
            set_row(
                0,
                prune_spec=DENSE.to_json(),
                prune_method="none",
                visual_tokens_kept=100,
                kept_tokens=mask(100, 100),
            ),
        ),
    ),
    "a unit that was cut out of the plan": (
        "the plan goes on at row 16 after 12 rows",
        lambda p: without_unit(p, 3),
    ),
    "the first unit was cut out": (
        "the plan goes on at row 4 after 0 rows",
        lambda p: without_unit(p, 0),
    ),
    "the last units were cut out of the plan": (
        "in a plan of other units",
        lambda p: cut_off(p, 6, 7),
    ),
    "a unit that is planned twice": ("planned twice", lambda p: replan(p, lambda u: [*u, u[2]])),
    "a unit of other rows under its name": (
        "the plan of unit",
        lambda p: replan(p, lambda u: [u[0] | {"row_count": 3}, *u[1:]]),
    ),
    "a ledger of words": ("cannot be read", lambda p: refooter_raw(p, 0, "asked", "x")),
    "a ledger of nothing": ("cannot be read", lambda p: refooter_raw(p, 0, "", None)),
    "numbers of a ledger as words": ("rows 4", lambda p: refooter_raw(p, 0, "rows", "9")),
    "a column is gone": (
        "cannot be read",
        lambda p: path(p, 0).write_bytes(
            write_unit_file(
                (found := p.output.open_unit(p.units[0].unit_id)).table.drop_columns(["unit_row"]),
                found.footer,
            )
        ),
    ),
    "the saving of the summary": (
        "measured.saving.seconds",
        lambda p: resummarise(p, "measured", "saving", "seconds", value=99.0),
    ),
    "a part of the summary that is said to be unknown": (
        "says rows 13",
        claim_rows_unknown,
    ),
    "tokens of a row": ("prompt_tokens", lambda p: forge(p, 0, set_row(2, prompt_tokens=1))),
    "kept tokens of a row": ("kept", lambda p: forge(p, 0, set_row(2, visual_tokens_kept=24))),
    "the mask of a row": ("", lambda p: forge(p, 0, set_row(2, kept_tokens=mask(24, 100)))),
    "modelled cost of a row": ("kv_bytes", lambda p: forge(p, 0, set_row(2, kv_bytes=1))),
    "a row is gone": ("3 rows", lambda p: forge(p, 0, lambda rows: rows[1:])),
    "a row is there twice": ("planned are 4", lambda p: forge(p, 0, lambda r: [*r[:3], r[2]])),
    "an error row became an answer": (
        "an answer without",
        lambda p: forge(p, 7, set_row(3, error_code=None, text="made up")),
    ),
    "an error row has a text": (
        "an error row with a text",
        lambda p: forge(p, 7, set_row(3, text="made up")),
    ),
    "an answer became an error": (
        "failed",
        lambda p: forge(p, 7, set_row(0, error_code="image_missing", text=None)),
    ),
    "rows of another run": ("rows have run_id", lambda p: forge(p, 0, set_row(0, run_id="x"))),
    "rows of another model": ("rows have model", lambda p: forge(p, 0, set_row(0, model="x"))),
    "rows of another spec": (
        "is not the run's",
        lambda p: forge(
            p,
            0,
            set_row(
                0,
                prune_spec=PruneSpec(method="grid", budget=Budget(ratio=0.25)).to_json(),
                prune_method="grid",
            ),
        ),
    ),
    "the rows of a ledger": ("rows 9", lambda p: refooter(p, 0, "rows", 9)),
    "the seconds of a ledger": ("nanoseconds 1", lambda p: refooter(p, 0, "nanoseconds", 1)),
    "the blocks of a ledger": ("blocks", lambda p: refooter(p, 1, "blocks", [[1, 9, 4, "cpu"]])),
    "the FLOPs of a ledger": ("flops", lambda p: refooter(p, 0, "flops", {"prefill": 1})),
    "a unit is gone": ("is not committed", lambda p: path(p, 0).unlink()),
    "a unit is no Parquet file": ("not a Parquet file", lambda p: path(p, 0).write_bytes(b"x")),
    "a foreign object": (
        "no unit of this run",
        lambda p: path(p, 0).with_name("more.parquet").write_bytes(path(p, 0).read_bytes()),
    ),
    "the rows of the summary": ("says rows 13", lambda p: resummarise(p, "rows", value=13)),
    "the ratio of the summary": (
        "dense_over_pruned.ratio",
        lambda p: resummarise(p, "measured", "dense_over_pruned", "ratio", value=3.3),
    ),
    "the seconds of the summary": (
        "measured.seconds",
        lambda p: resummarise(p, "measured", "seconds", value=1.0),
    ),
    "the modelled cost of the summary": (
        "modelled.flops.prefill",
        lambda p: resummarise(p, "modelled", "flops", "prefill", value=1),
    ),
    "a figure that no summary has": (
        "it says saved '50 %'",
        lambda p: resummarise(p, "saved", value="50 %"),
    ),
    "the summary is no object": (
        "summary.json",
        lambda p: (Path(p.output.uri) / "_run/summary.json").write_text("[]"),
    ),
    "the summary is no JSON": (
        "summary.json: cannot be read",
        lambda p: (Path(p.output.uri) / "_run/summary.json").write_text("{"),
    ),
    "the summary is gone": (
        "no summary",
        lambda p: (Path(p.output.uri) / "_run/summary.json").unlink(),
    ),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_what_was_changed_is_found_and_named(planned: Planned, kind: str) -> None:
    said, tamper = TAMPERED[kind]
    tamper(planned)
    found = [f"{one.where}: {one.what}" for one in look(planned).differences]
    assert found
    assert any(said in line for line in found), found


def test_an_answer_that_is_not_the_text_is_found(tmp_path: Path) -> None:
    """Accuracy is that of the answers, and every other figure that of the texts."""
    planned = run(tmp_path, kind="vqa", prompt="{question}")
    keep_summary(planned.output, summarise(planned.output))
    assert not look(planned).differences
    agree(planned, 0, set_row(1, answer="the reference"))
    (found,) = look(planned).differences
    assert "an answer that is not their text" in found.what


def test_a_row_that_was_mended_amid_a_block_is_no_difference(planned: Planned) -> None:
    """It could not be read when the block was sent."""
    found = planned.output.open_unit(planned.units[0].unit_id)
    before = found.table.to_pylist()
    measured = planned.output.open_unit(planned.units[1].unit_id).table.to_pylist()
    block = ("is_control", "control_text", "control_seconds", *STEADY)
    for number in (0, 2, 3):
        before[number] |= {name: measured[number][name] for name in block}
    rows = pa.Table.from_pylist(before, found.table.schema)
    retried = (Retry(writer="w", asked=1, mended=1),)
    for retries in ((), retried):
        footer = replace(found.footer, ledger=unit_ledger(rows), retries=retries)
        path(planned, 0).write_bytes(write_unit_file(rows, footer))
        keep_summary(planned.output, summarise(planned.output))
        assert bool(look(planned).differences) == (not retries)


def test_a_spoiled_block_is_no_difference(planned: Planned) -> None:
    nothing = dict.fromkeys(("control_text", "control_seconds", *STEADY))
    agree(planned, 1, lambda rows: [row | nothing for row in rows])
    assert not look(planned).differences
    assert summarise(planned.output).total.blocks_spoiled == 1


def test_all_that_differs_is_named_whatever_else_cannot_be_read(planned: Planned) -> None:
    forge(planned, 0, set_row(1, seconds=float("nan")))
    refooter_raw(planned, 2, "", None)
    path(planned, 4).write_bytes(b"x")
    forge(planned, 5, set_row(1, seconds=9.0))
    named = {one.where.split()[0] for one in look(planned).differences}
    assert named >= {planned.units[number].unit_id for number in (0, 2, 4, 5)}


def test_a_run_that_has_not_ended_differs_in_nothing(planned: Planned) -> None:
    """Its summary says so; one that was stopped has none, or that of the attempt before."""
    path(planned, 2).unlink()
    keep_summary(planned.output, summarise(planned.output))
    found = look(planned)
    assert (found.units, found.open, found.differences) == (UNITS - 1, 1, ())
    (Path(planned.output.uri) / "_run/summary.json").unlink()
    found = look(planned)
    assert (found.units, found.open, found.differences) == (UNITS - 1, 1, ())


def test_a_summary_of_an_attempt_before_differs_in_nothing(planned: Planned) -> None:
    """Its run was resumed, and stopped before it ended: only then is a unit missing."""
    kept = {number: path(planned, number) for number in (2, 3)}
    data = {number: place.read_bytes() for number, place in kept.items()}
    for place in kept.values():
        place.unlink()
    keep_summary(planned.output, summarise(planned.output))
    kept[2].write_bytes(data[2])
    found = look(planned)
    assert (found.units, found.open, found.differences) == (UNITS - 1, 1, ())
    kept[3].write_bytes(data[3])
    assert any("says units_done 6" in one.what for one in look(planned).differences)


def test_a_figure_that_was_not_available_is_no_difference(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    resummarise(planned, "duplicate_keys", value=None)
    assert look(planned).differences
    resummarise(planned, "unavailable", value={"keys": "too many"})
    assert not look(planned).differences
    keep_summary(planned.output, summarise(planned.output))

    def fails(*_: object) -> int:
        raise MemoryError("no room")

    monkeypatch.setattr("cluster.output.summary._count_duplicates", fails)
    (found,) = look(planned).differences
    assert "duplicate_keys, which cannot be made anew: MemoryError: no room" in found.what


def test_other_settings_are_another_run_whose_units_are_missing(planned: Planned) -> None:
    place = Path(planned.output.uri) / "_run/manifest.json"
    record = json.loads(place.read_text())
    record["settings"]["prompt"] = "another"
    place.write_text(json.dumps(record))
    found = look(planned)
    assert found.units == 0
    assert sum(one.what == "this unit is not committed" for one in found.differences) == UNITS


@pytest.mark.parametrize(("low", "spec"), [(1.5, SPEC), (0.5, DENSE)])
def test_a_run_that_decides_has_rows_of_what_it_decided(
    tmp_path: Path, low: float, spec: PruneSpec
) -> None:
    """And not of the other spec, whatever its decision says by now."""
    planned = run(tmp_path, spec, auto=True)
    blocks = [Block(100, round(100 * low) + n % 3, 64, "cpu") for n in range(6)]
    planned.output.keep_break_even(BreakEven.from_blocks(blocks, seconds=2.0))
    keep_summary(planned.output, summarise(planned.output))
    assert not look(planned).differences
    place = Path(planned.output.uri) / "_run/break-even.json"
    decision = json.loads(place.read_text())
    decision["measured"]["low"] = 2.0 - low
    place.write_text(json.dumps(decision))
    found = [one.what for one in look(planned).differences]
    assert any("is not the run's" in what for what in found)
    assert any("says measured.low" in what for what in found), "its blocks say other"
    place.write_text("{")
    assert any("cannot be read" in one.what for one in look(planned).differences)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_a_run_of_an_earlier_schema_version_is_refused(planned: Planned, version: int) -> None:
    place = Path(planned.output.uri) / "_run/manifest.json"
    record = json.loads(place.read_text())
    record["settings"]["schema_version"] = version
    place.write_text(json.dumps(record))
    with pytest.raises(UsageError, match=f"schema version {version}"):
        look(planned)


def test_a_digest_is_of_the_rows_alone(planned: Planned) -> None:
    data = path(planned, 0).read_bytes()
    assert has_written_rows(data)
    assert not has_written_rows(data[:4] + bytes([data[4] ^ 1]) + data[5:])


def test_an_outsider_checks_a_saving_with_pyarrow(
    planned: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    """The snippet of `cluster/README.md`, as it stands there."""
    page = (Path(__file__).parents[3] / "cluster/README.md").read_text()
    snippet = page.split("### Check a claimed saving")[1].split("```python\n")[1].split("```")[0]
    exec(snippet, {"output": planned.output.uri})
    measured = summarise(planned.output).measured
    assert measured is not None
    printed = capsys.readouterr().out
    assert f"{measured.ratio:.2f} x on 24 rows in 6 blocks" in printed
    assert f"95 % interval {measured.low:.2f} - {measured.high:.2f}" in printed
    resummarise(planned, "measured", "seconds", value=99.0)
    with pytest.raises(AssertionError):
        exec(snippet, {"output": planned.output.uri})
