"""The verdict on a run, from the truth of its corpus and the objects of its output alone."""

from __future__ import annotations

import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow.parquet as pq

from tests.chaos.corpus import TEXT, Corpus, TrueRow
from tests.chaos.engine import COST, RETAIN
from tests.chaos.history import Finding, ObjectWrite, check_history, is_visible, read_rows
from tests.cluster.fake_engine import VISUAL_TOKENS

DONE: Final = 0
DONE_WITH_ERRORS: Final = 3
_INCOMPLETE: Final = 5
_FAILED: Final = 1
_STOPPED: Final = {"KILL": {-9}, "TERM": {143}}
_NOT_READY: Final = -15
_SUMMED: Final = ("visual_tokens", "visual_tokens_kept", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One invocation of the command."""

    code: int
    """Its exit code; negative for a signal."""
    signals: tuple[str, ...]
    """KILL and TERM, as they were sent to it."""
    excused: bool
    """Whether something happened that may end a run: the death of a head, or a store that does not
    answer its first requests."""
    commits: int
    """Objects with rows that there were when it ended."""
    was_ready: bool
    """Whether it had printed anything before it was sent a signal."""


def check_run(
    corpus: Corpus,
    objects: Mapping[str, bytes],
    writes: Sequence[ObjectWrite],
    attempts: Sequence[Attempt],
) -> list[Finding]:
    """Every broken promise of a run that is over.

    objects: the output, by key. writes: its history. attempts: in order of their end.
    """
    units = {key: body for key, body in sorted(objects.items()) if is_visible(key)}
    rows: list[dict[str, Any]] = []
    findings: list[Finding] = []
    for key, body in units.items():
        try:
            rows += read_rows(body)
            findings += check_ledger(key, body)
        except Exception as error:  # whatever pyarrow raises: a reader would meet it too
            findings.append(Finding(harm="wrong", text=f"{key} is not readable: {error}"))
    findings += check_rows(corpus, rows)
    findings += check_summary(corpus, objects, rows)
    findings += check_history(writes)
    findings += check_exits(corpus, rows, attempts)
    return findings


def check_rows(corpus: Corpus, rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Each row of the corpus once, as what it must be, and none besides."""
    return [*_check_places(rows), *_check_identities(corpus, rows)]


def _check_places(rows: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    runs = {row["run_id"] for row in rows}
    if len(runs) > 1:
        yield Finding(harm="wrong", text=f"rows of several runs: {sorted(map(str, runs))}")
    numbers: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        numbers[row["unit_id"]].append(row["unit_row"])
    for unit, found in numbers.items():
        twice = [number for number, times in Counter(found).items() if times > 1]
        if twice:
            yield Finding(harm="doubled", text=f"unit {unit} has the rows {twice[:5]} twice")
        gaps = sorted(set(range(max(found) + 1)) - set(found))
        if gaps:
            yield Finding(harm="lost", text=f"unit {unit} lacks the rows {gaps[:5]}")


def _check_identities(corpus: Corpus, rows: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    truth = {row.serial: row for row in corpus.rows}
    by_key = {row.key: row.serial for row in corpus.rows if row.key is not None}
    found: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    nameless = []
    for row in rows:
        value = row.get(corpus.serial_column)
        serial = by_key.get(row["key"]) if value is None else int(value)
        if serial is None:
            nameless.append(row)
        elif serial not in truth:
            yield Finding(harm="wrong", text=f"row {serial} is not in the corpus")
        else:
            found[serial].append(row)
    lost = [serial for serial, row in truth.items() if serial not in found and not row.optional]
    if lost:
        yield Finding(harm="lost", text=f"{len(lost)} rows are missing: {lost[:8]}")
    for serial, copies in found.items():
        if len(copies) > 1:
            yield Finding(harm="doubled", text=f"row {serial} is there {len(copies)} times")
        for row in copies:
            yield from _check_row(truth[serial], row, corpus.damage_codes)
    yield from _check_nameless(corpus, nameless)
    hurt = [copy for serial, copies in found.items() if truth[serial].optional for copy in copies]
    told = {row["error_code"] for row in [*nameless, *hurt]} & corpus.damage_codes
    if corpus.is_damaged and not told:
        yield Finding(harm="lost", text="bytes of an archive are gone, and no row says so")


def _check_nameless(corpus: Corpus, rows: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Rows that are no row of the corpus: error rows for a damaged file, and only a few."""
    odd = [row["key"] for row in rows if row["error_code"] not in corpus.damage_codes]
    if odd or len(rows) > corpus.damage_rows:
        keys = odd or [row["key"] for row in rows]
        codes = Counter(row["error_code"] for row in rows)
        text = f"{len(keys)} rows of no row in the corpus: {keys[:3]}, {dict(codes)}"
        yield Finding(harm="wrong", text=text)


def _check_row(
    truth: TrueRow, row: Mapping[str, Any], damage_codes: frozenset[str]
) -> Iterator[Finding]:
    name, code = f"row {truth.serial}", row["error_code"]
    if truth.key is not None and row["key"] != truth.key:
        yield Finding(harm="wrong", text=f"{name} has the key {row['key']!r}, not {truth.key!r}")
    if (row["text"] is None) == (code is None):
        yield Finding(harm="wrong", text=f"{name} has text {row['text']!r} and error {code!r}")
    elif code is not None:
        allowed = truth.outcomes | (damage_codes if truth.optional else frozenset())
        if code not in allowed:
            good = truth.outcomes == {TEXT}
            message = str(row["error_message"])[:160]
            yield Finding(
                harm="lost" if good else "wrong",
                text=f"{name} is {code} ({message}), must be {' or '.join(sorted(allowed))}",
            )
        elif code == "inference_failed" and row["attempts"] < 2:
            yield Finding(harm="wrong", text=f"{name} failed in the model and was not asked again")
    elif TEXT not in truth.outcomes:
        yield Finding(harm="wrong", text=f"{name} was answered, must be {sorted(truth.outcomes)}")
    elif row["text"] != truth.text:
        text = f"{name} says {row['text']!r}, must say {truth.text!r}"
        yield Finding(harm="wrong", text=text)
    else:
        yield from _check_answer(name, truth, row)


def _check_answer(name: str, truth: TrueRow, row: Mapping[str, Any]) -> Iterator[Finding]:
    """The columns of an answered row besides its text."""
    kept = int(VISUAL_TOKENS * RETAIN)
    right: dict[str, Any] = {"visual_tokens": VISUAL_TOKENS, "visual_tokens_kept": kept}
    if truth.note is not None:
        right["note"] = truth.note
    if truth.question is not None:
        right |= {"question": truth.question, "answer": truth.text}
    right["control_text"] = truth.control if _is_measured(row) else None
    for column, value in right.items():
        if row[column] != value:
            text = f"{name} has {row[column]!r} as {column}, not {value!r}"
            yield Finding(harm="wrong", text=text)
    marked = int.from_bytes(row["kept_tokens"], "little").bit_count()
    if marked != kept:
        yield Finding(harm="wrong", text=f"{name} marks {marked} tokens as kept, not {kept}")


def _is_measured(row: Mapping[str, Any]) -> bool:
    """Whether a control row was answered densely too."""
    return bool(row["is_control"]) and row["control_seconds"] is not None


def _nanoseconds(rows: Sequence[Mapping[str, Any]], column: str) -> int:
    return sum(round((row[column] or 0.0) * 1e9) for row in rows)


_STEADY = ("steady_seconds", "control_steady_seconds")


def _at_pace(rows: Sequence[Mapping[str, Any]], column: str) -> int:
    """Nanoseconds of so many rows, each with the mean of the column."""
    known = [row[column] for row in rows if row[column] is not None]
    return round(len(rows) * math.fsum(known) / len(known) * 1e9)


def check_ledger(key: str, body: bytes) -> list[Finding]:
    """The ledger in an object's footer against the object's rows."""
    metadata = pq.read_metadata(io.BytesIO(body)).metadata or {}
    if b"sppruner.ledger" not in metadata:
        return [Finding(harm="wrong", text=f"{key} has no ledger")]
    ledger = json.loads(metadata[b"sppruner.ledger"])
    rows = read_rows(body)
    answered = [row for row in rows if row["error_code"] is None]
    controls = [row for row in rows if row["is_control"]]
    measured = [row for row in controls if _is_measured(row)]
    attempts = [row["attempts"] or 0 for row in rows]
    true: dict[str, Any] = {
        "rows": len(rows),
        "failed": dict(Counter(row["error_code"] for row in rows if row["error_code"])),
        "attempts": sum(attempts),
        "recomputed": sum(number > 1 for number in attempts),
        **{name: sum(row[name] or 0 for row in answered) for name in _SUMMED},
        **{name: _times(cost, len(answered)) for name, cost in COST.to_dict().items()},
        "agreements": sum(row["text"] == row["control_text"] for row in measured),
        "blocks": [
            [
                _at_pace(measured, "steady_seconds"),
                _at_pace(measured, "control_steady_seconds"),
                len(measured),
                measured[0]["device"],
            ]
        ]
        if all(any(row[name] is not None for row in measured) for name in _STEADY)
        else [],
        "blocks_spoiled": int(bool(controls) and not measured),
        "control_nanoseconds": _nanoseconds(measured, "control_seconds")
        + _nanoseconds(controls, "discarded_seconds"),
        "retry_nanoseconds": _nanoseconds(
            [row for row in rows if not row["is_control"]], "discarded_seconds"
        ),
    }
    findings = [
        Finding(harm="wrong", text=f"{key}: its ledger says {ledger.get(name)} {name}, not {value}")
        for name, value in true.items()
        if ledger.get(name) != value
    ]
    seconds = sum(row["seconds"] or 0.0 for row in answered)
    if abs(ledger["nanoseconds"] / 1e9 - seconds) > 1e-6 * max(1, len(rows)):
        text = f"{key}: its ledger says {ledger['nanoseconds']} ns, its rows {seconds} s"
        findings.append(Finding(harm="wrong", text=text))
    return findings


def check_summary(
    corpus: Corpus, objects: Mapping[str, bytes], rows: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """What the run says of itself at its end."""
    if "_run/summary.json" not in objects:
        return [Finding(harm="wrong", text="no summary was written")]
    summary = json.loads(objects["_run/summary.json"])
    answered = [row for row in rows if row["error_code"] is None]
    failed = dict(Counter(row["error_code"] for row in rows if row["error_code"]))
    units = {row["unit_id"] for row in rows}
    true: dict[str, Any] = {
        "run_id": next((row["run_id"] for row in rows), summary["run_id"]),
        "state": "completed_with_errors" if failed else "completed",
        "units": len(units),
        "units_done": len(units),
        "rows": len(rows),
        "rows_planned": len(rows),
        "rows_failed": failed,
        "rows_recomputed": sum((row["attempts"] or 0) > 1 for row in rows),
        **{name: sum(row[name] or 0 for row in answered) for name in _SUMMED},
        "modelled": {name: _times(cost, len(answered)) for name, cost in COST.to_dict().items()},
    }
    findings = [
        Finding(harm="wrong", text=f"the summary says {summary[name]} {name}, not {value}")
        for name, value in true.items()
        if summary[name] != value
    ]
    controls = [row for row in answered if _is_measured(row)]
    agreements = sum(row["text"] == row["control_text"] for row in controls)
    measured = summary["measured"]
    told = measured["control_rows"], measured["control_agreements"]
    if told != (len(controls), agreements):
        text = f"the summary says {told} control rows and agreements of {len(controls)}"
        findings.append(Finding(harm="wrong", text=f"{text}, {agreements}"))
    if corpus.is_damaged and not summary["unread_bytes"]:
        findings.append(Finding(harm="wrong", text="the summary knows of no damaged byte"))
    return findings


def _times(cost: Any, number: int) -> Any:
    if isinstance(cost, dict):
        return {name: value * number for name, value in cost.items()} if number else {}
    return cost * number


def check_exits(
    corpus: Corpus, rows: Sequence[Mapping[str, Any]], attempts: Sequence[Attempt]
) -> list[Finding]:
    """The exit codes that the README prints, of every invocation."""
    findings = []
    bad = any(row["error_code"] for row in rows)
    units = len({row["unit_id"] for row in rows})
    for number, attempt in enumerate(attempts, 1):
        if attempt.code in (DONE, DONE_WITH_ERRORS):
            right = attempt.code == (DONE_WITH_ERRORS if bad else DONE)
            right = right and attempt.commits == units
        elif attempt.signals:
            right = any(attempt.code in _STOPPED[name] for name in attempt.signals)
            right = right or (attempt.code == _NOT_READY and not attempt.was_ready)
        else:
            right = attempt.excused and attempt.code in (_FAILED, _INCOMPLETE)
        if not right:
            text = f"attempt {number} ended with {attempt.code}"
            findings.append(Finding(harm="wrong", text=text + _reason(attempt, bad, units)))
    if not attempts or attempts[-1].code not in (DONE, DONE_WITH_ERRORS):
        findings.append(Finding(harm="stuck", text=f"not completed in {len(attempts)} attempts"))
    return findings


def _reason(attempt: Attempt, bad: bool, units: int) -> str:
    if attempt.code in (DONE, DONE_WITH_ERRORS):
        return f", with{'' if bad else 'out'} error rows and {attempt.commits} of {units} units"
    return ", which nothing that happened explains"
