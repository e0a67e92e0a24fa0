"""A judge that cannot find anything is worth nothing: right outputs pass, and each kind of harm to
one is found, whichever row it hits."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chaos.corpus import TEXT, Corpus, CorpusShape, draw_corpus
from tests.chaos.history import ObjectWrite, check_history
from tests.chaos.judge import Attempt, check_exits, check_rows, check_run
from tests.chaos.schedule import draw_schedule
from tests.cluster.fake_engine import first_kept

Row = dict[str, Any]
SHAPE = CorpusShape(
    format="parquet", task="vqa", rows=30, files=2, bad=("corrupt_image", "no_image", "raises")
)
CORPUS = draw_corpus(SHAPE, 5)
GOOD = next(row.serial for row in CORPUS.rows if row.outcomes == {TEXT})
BAD = next(row.serial for row in CORPUS.rows if TEXT not in row.outcomes)
RAISED = next(row.serial for row in CORPUS.rows if "inference_failed" in row.outcomes)
TOKENS = ("visual_tokens", "visual_tokens_kept", "prompt_tokens", "completion_tokens")
_SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("key", "text", "error_code", "error_message")],
        *[(name, pa.int32()) for name in ("attempts", "prompt_tokens", "completion_tokens")],
        *[(name, pa.int32()) for name in ("visual_tokens", "visual_tokens_kept", "unit_row")],
        *[(name, pa.string()) for name in ("run_id", "unit_id", "control_text")],
        *[(name, pa.string()) for name in ("question", "answer", "note")],
        *[(name, pa.float64()) for name in ("seconds", "control_seconds", "discarded_seconds")],
        *[(name, pa.float64()) for name in ("steady_seconds", "control_steady_seconds")],
        ("device", pa.string()),
        ("kept_tokens", pa.binary()),
        ("is_control", pa.bool_()),
    ]
)


def right_rows(corpus: Corpus, unit_rows: int = 8) -> list[Row]:
    """What a run must write for a corpus; rows that damage took are left out."""
    rows = []
    for number, true in enumerate(row for row in corpus.rows if not row.optional):
        answered = TEXT in true.outcomes
        control = answered and number % 8 < 2
        measured = control and number // 8 != 1  # its block is spoiled
        rows.append(
            {
                "key": true.key,
                "question": true.question,
                "answer": true.text,
                "note": true.note,
                "kept_tokens": first_kept(25, 100) if answered else None,
                "control_text": true.control if measured else None,
                "control_seconds": 0.02 if measured else None,
                "steady_seconds": 0.01 if measured else None,
                "control_steady_seconds": 0.02 if measured and number % 8 else None,
                "discarded_seconds": 0.0 if measured else 0.5,
                "device": "cpu" if answered else None,
                corpus.serial_column: true.serial,
                "text": true.text if answered else None,
                "error_code": None if answered else min(true.outcomes),
                "error_message": None if answered else "bad",
                "attempts": 2 if "inference_failed" in true.outcomes else 1,
                "prompt_tokens": 40 if answered else None,
                "completion_tokens": 3 if answered else None,
                "visual_tokens": 100 if answered else None,
                "visual_tokens_kept": 25 if answered else None,
                "seconds": 0.01 if answered else None,
                "is_control": control,
                "run_id": "run-1",
                "unit_id": f"unit-{number // unit_rows}",
                "unit_row": number % unit_rows,
            }
        )
    return rows


def ledger(rows: list[Row]) -> dict[str, Any]:
    answered = [row for row in rows if row["error_code"] is None]
    controls = [row for row in rows if row["is_control"]]
    measured = [row for row in controls if row["control_seconds"] is not None]
    return {
        "rows": len(rows),
        "failed": dict(Counter(row["error_code"] for row in rows if row["error_code"])),
        "attempts": sum(row["attempts"] for row in rows),
        "recomputed": sum(row["attempts"] > 1 for row in rows),
        **{name: sum(row[name] or 0 for row in answered) for name in TOKENS},
        "nanoseconds": round(sum(row["seconds"] for row in answered) * 1e9),
        "blocks": [[10_000_000 * len(measured), 20_000_000 * len(measured), len(measured), "cpu"]]
        if measured
        else [],
        "blocks_spoiled": int(bool(controls) and not measured),
        "control_nanoseconds": 20_000_000 * len(measured) + discarded(controls),
        "retry_nanoseconds": discarded([row for row in rows if not row["is_control"]]),
        "agreements": agreements(rows),
        **modelled(len(answered)),
    }


def discarded(rows: list[Row]) -> int:
    return sum(round(row["discarded_seconds"] * 1e9) for row in rows)


def agreements(rows: list[Row]) -> int:
    measured = [row for row in rows if row["control_seconds"] is not None]
    return sum(row["text"] == row["control_text"] for row in measured)


def modelled(answered: int) -> dict[str, Any]:
    flops = {"flops": {"vision": 3, "prefill": 5}, "flops_dense": {"vision": 3, "prefill": 11}}
    sums = {
        name: {part: value * answered for part, value in parts.items()} if answered else {}
        for name, parts in flops.items()
    }
    return sums | {"flops_cached": {}, "kv_bytes": 7 * answered, "kv_bytes_dense": 17 * answered}


def summary(corpus: Corpus, rows: list[Row]) -> dict[str, Any]:
    units = len({row["unit_id"] for row in rows})
    total = ledger(rows)
    return {
        "run_id": rows[0]["run_id"],
        "state": "completed_with_errors" if total["failed"] else "completed",
        "units": units,
        "units_done": units,
        "rows": len(rows),
        "rows_planned": len(rows),
        "rows_failed": total["failed"],
        "rows_recomputed": total["recomputed"],
        "unread_bytes": 600 if corpus.is_damaged else 0,
        "modelled": modelled(len(rows) - sum(total["failed"].values())),
        "measured": {
            "control_rows": sum(row["control_seconds"] is not None for row in rows),
            "control_agreements": total["agreements"],
        },
        **{name: total[name] for name in TOKENS},
    }


def pack(rows: list[Row], account: dict[str, Any] | None = None, *, generation: int = 0) -> bytes:
    """The rows as one object. account: its ledger, where it is not to be the right one."""
    serial = _serial(rows[0])
    named = [row | {serial: None if row[serial] is None else str(row[serial])} for row in rows]
    table = pa.Table.from_pylist(named, schema=_SCHEMA.append(pa.field(serial, pa.string())))
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(
            {
                "sppruner.ledger": json.dumps(account or ledger(rows)),
                "sppruner.generation": json.dumps({"generation": generation}),
            }
        )
    return buffer.getvalue()


def objects_of(rows: list[Row], corpus: Corpus = CORPUS) -> dict[str, bytes]:
    """An output that holds these rows, each in the object of its unit."""
    units: dict[str, list[Row]] = {}
    for row in rows:
        units.setdefault(row["unit_id"], []).append(row)
    told = json.dumps(summary(corpus, rows)).encode()
    packed = {f"{unit}.parquet": pack(found) for unit, found in units.items()}
    return {**packed, "_run/summary.json": told, "_run/manifest.json": b"{}"}


def _serial(row: Row) -> str:
    return "serial" if "serial" in row else "id"


def harms(objects: dict[str, bytes], corpus: Corpus = CORPUS) -> set[str]:
    writes = [ObjectWrite(key=key, body=body) for key, body in objects.items()]
    rows = [row for key, body in objects.items() if key.endswith("t") for row in _rows(body)]
    bad = any(row["error_code"] for row in rows)
    units = len({row["unit_id"] for row in rows})
    attempts = [attempt(3 if bad else 0, commits=units)]
    return {finding.harm for finding in check_run(corpus, objects, writes, attempts)}


def attempt(
    code: int, signal: str | None = None, excused: bool = False, commits: int = 0,
    was_ready: bool = True,
) -> Attempt:  # fmt: skip
    signals = () if signal is None else (signal,)
    return Attempt(
        code=code, signals=signals, excused=excused, commits=commits, was_ready=was_ready
    )


def _rows(body: bytes) -> list[Row]:
    try:
        return list(pq.read_table(io.BytesIO(body)).to_pylist())
    except pa.ArrowException:
        return []


def change(serial: int, **values: Any) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [r | values if r["serial"] == serial else r for r in rows]


def error(code: str) -> dict[str, Any]:
    gone = dict.fromkeys(
        ("text", "answer", "visual_tokens", "visual_tokens_kept", "seconds", "device",
         "control_text", "control_seconds", "steady_seconds", "control_steady_seconds")
    )  # fmt: skip
    return {**gone, "error_code": code, "error_message": "?"}  # in its block, if it was in one


def damage_row(row: Row) -> Row:
    """An error row that stands for a damaged range, in the output that `row` is of."""
    place = {"id": None, "key": "00000.tar@512", "unit_id": "unit-9", "unit_row": 0}
    return row | error("archive_truncated") | place


def swap_texts(rows: list[Row]) -> list[Row]:
    first, second = [row for row in rows if row["text"]][:2]
    texts = {first["serial"]: second["text"], second["serial"]: first["text"]}
    return [row | {"text": texts.get(row["serial"], row["text"])} for row in rows]


def swap(column: str) -> Callable[[list[Row]], list[Row]]:
    def mutate(rows: list[Row]) -> list[Row]:
        return [row | {column: other[column]} for row, other in zip(rows, rows[::-1], strict=True)]

    return mutate


END = attempt(3, commits=4)
ANSWER = {"text": "x", "error_code": None, "visual_tokens": 100, "visual_tokens_kept": 25,
          "seconds": 0.01, "prompt_tokens": 1, "completion_tokens": 1,
          "kept_tokens": bytes(13)}  # fmt: skip
MUTATIONS: dict[str, tuple[str, Callable[[list[Row]], list[Row]]]] = {
    "a unit is missing": ("lost", lambda rows: [r for r in rows if r["unit_id"] != "unit-1"]),
    "the last row is missing": ("lost", lambda rows: rows[:-1]),
    "a good row failed": ("lost", change(GOOD, **error("inference_failed"))),
    "a row is there twice": ("doubled", lambda rows: [*rows, rows[3]]),
    "a row is in two units": (
        "doubled",
        lambda rows: [*rows, rows[3] | {"unit_id": "unit-9", "unit_row": 0}],
    ),
    "texts are swapped": ("wrong", swap_texts),
    "a row of another run": ("wrong", change(GOOD, run_id="run-2")),
    "a row of no corpus": (
        "wrong",
        lambda rows: [*rows, rows[3] | {"serial": 999, "unit_id": "unit-9", "unit_row": 0}],
    ),
    "a bad row was answered": ("wrong", change(BAD, **ANSWER)),
    "a bad row has another code": ("wrong", change(BAD, error_code="engine_broken")),
    "neither text nor error": ("wrong", change(GOOD, text=None)),
    "another key": ("wrong", change(GOOD, key="another")),
    "another key of a bad row": ("wrong", change(BAD, key="another")),
    "answers are swapped": ("wrong", swap("answer")),
    "questions are swapped": ("wrong", swap("question")),
    "a source column is swapped": ("wrong", swap("note")),
    "the mask says something else": ("wrong", change(GOOD, kept_tokens=bytes(13))),
    "another dense twin": (
        "wrong",
        change(GOOD, control_text="x", is_control=True, control_seconds=0.02),
    ),
    "not asked a second time": ("wrong", change(RAISED, attempts=1)),
    "nothing was pruned": ("wrong", change(GOOD, visual_tokens_kept=100)),
}


def test_a_right_output_is_found_right() -> None:
    assert harms(objects_of(right_rows(CORPUS))) == set()


@given(seed=st.integers(0, 400))
@settings(max_examples=8)
def test_every_drawn_corpus_has_a_right_output(seed: int) -> None:
    corpus = draw_corpus(draw_schedule(seed).corpus, seed)
    rows = right_rows(corpus, unit_rows=64)
    if corpus.is_damaged:
        rows.append(damage_row(rows[0]))
    assert harms(objects_of(rows, corpus), corpus) == set()
    assert corpus.files == draw_corpus(draw_schedule(seed).corpus, seed).files


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_output_is_found_wrong(name: str) -> None:
    harm, mutate = MUTATIONS[name]
    assert harms(objects_of(mutate(right_rows(CORPUS)))) == {harm}


@given(place=st.integers(0, SHAPE.rows - 1))
@settings(max_examples=10)
def test_no_row_can_go_or_come_unseen(place: int) -> None:
    rows = right_rows(CORPUS)
    assert "lost" in harms(objects_of(rows[:place] + rows[place + 1 :]))
    assert "doubled" in harms(objects_of([*rows, rows[place]]))


@pytest.mark.parametrize(
    "name",
    ["rows", "attempts", "recomputed", "visual_tokens", "visual_tokens_kept", "prompt_tokens",
     "completion_tokens", "nanoseconds", "agreements", "kv_bytes"],
)  # fmt: skip
def test_a_ledger_that_differs_from_its_rows_is_found(name: str) -> None:
    rows = right_rows(CORPUS)
    unit = [row for row in rows if row["unit_id"] == "unit-1"]
    account = ledger(unit)
    account[name] += 100_000 if name == "nanoseconds" else 1
    objects = objects_of(rows) | {"unit-1.parquet": pack(unit, account)}
    assert harms(objects) == {"wrong"}


def test_an_unreadable_object_and_a_summary_that_is_off_are_found() -> None:
    right = objects_of(right_rows(CORPUS))
    assert harms(right | {"unit-1.parquet": b"PAR1"}) == {"wrong", "lost"}
    told = json.loads(right["_run/summary.json"])
    for name in told:
        off = json.dumps(told | {name: None if isinstance(told[name], str) else {}}).encode()
        if name not in ("measured", "unread_bytes"):
            assert harms(right | {"_run/summary.json": off}) == {"wrong"}, name
    del right["_run/summary.json"]
    assert harms(right) == {"wrong"}


def test_a_row_that_was_there_twice_for_a_moment_is_found() -> None:
    body, other = pack(right_rows(CORPUS)[:8]), pack(right_rows(CORPUS)[8:16])
    once = ObjectWrite(key="a.parquet", body=body)
    twice = ObjectWrite(key="b.parquet", body=body)
    gone = ObjectWrite(key="b.parquet", body=None)
    assert check_history([once, ObjectWrite(key="_run/x.parquet", body=body)]) == []
    assert [f.harm for f in check_history([once, twice, gone])] == ["doubled", "wrong"]
    replaced = ObjectWrite(key="a.parquet", body=other)
    assert [f.harm for f in check_history([once, replaced])] == ["wrong"]


def test_a_second_write_and_one_without_a_condition_are_found() -> None:
    body = pack(right_rows(CORPUS)[:8])
    once = ObjectWrite(key="a.parquet", body=body)
    assert [f.harm for f in check_history([once, once])] == ["wrong"]
    careless = ObjectWrite(key="a.parquet", body=body, conditional=False)
    assert [f.harm for f in check_history([careless])] == ["wrong"]


def test_a_later_generation_may_answer_errors_and_change_nothing_else() -> None:
    rows = right_rows(CORPUS)
    asked = [rows[0] | error("busy"), *rows[1:8]]
    bodies = [pack(asked), pack(rows[:8], generation=1), pack(asked, generation=2)]
    first, second, third = (ObjectWrite(key="a.parquet", body=body) for body in bodies)
    assert check_history([first, second]) == []
    assert [finding.harm for finding in check_history([first, third])] == ["wrong"]
    assert [finding.harm for finding in check_history([first, second, third])] == ["wrong"]


@pytest.mark.parametrize(
    ("attempts", "found"),
    [
        ([END], []),
        ([attempt(-9, "KILL"), END], []),
        ([attempt(143, "TERM"), attempt(5, excused=True), END], []),
        ([attempt(-15, "TERM", was_ready=False), END], []),
        ([attempt(-15, "TERM"), END], ["wrong"]),
        ([attempt(5, "TERM"), END], ["wrong"]),
        ([attempt(1, excused=True), END], []),
        ([attempt(1), END], ["wrong"]),
        ([attempt(5), END], ["wrong"]),
        ([attempt(0, commits=4)], ["wrong"]),  # there are error rows
        ([attempt(3, commits=3), END], ["wrong"]),  # there were units to do
        ([attempt(0, "TERM", commits=4), END], ["wrong"]),
        ([attempt(2, excused=True), END], ["wrong"]),
        ([replace(attempt(-9), signals=("KILL", "TERM")), END], []),
        ([attempt(-9, "KILL")], ["stuck"]),
        ([], ["stuck"]),
    ],
)
def test_exit_codes_mean_what_the_page_says(attempts: list[Attempt], found: list[str]) -> None:
    findings = check_exits(CORPUS, right_rows(CORPUS), attempts)
    assert [finding.harm for finding in findings] == found


def test_damage_may_cost_its_own_rows_and_no_others() -> None:
    shape = CorpusShape(format="tar", task="caption", rows=20, files=1, bad=(), damage="zeroed")
    corpus = draw_corpus(shape, 3)
    (hurt,) = [row for row in corpus.rows if row.optional]
    rows = right_rows(corpus)
    damage = damage_row(rows[0])
    assert check(corpus, rows) == {"lost"}, "the damage must be told"
    assert check(corpus, [*rows, damage]) == set()
    failed = rows[0] | error("image_missing") | {
        "id": hurt.serial, "key": hurt.key, "unit_id": "u9", "unit_row": 0
    }  # fmt: skip
    assert check(corpus, [*rows, failed]) == set()
    assert check(corpus, [*rows[:-1], damage]) == {"lost"}
    many = [damage | {"unit_row": number} for number in range(9)]
    assert check(corpus, [*rows, *many]) == {"wrong"}


def check(corpus: Corpus, rows: list[Row]) -> set[str]:
    return {finding.harm for finding in check_rows(corpus, rows)}
