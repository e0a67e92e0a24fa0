"""What a run did, from its committed units alone: the same for a fresh run, a resumed one, and
one that somebody looks at a year later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import structlog

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.ledger import RunLedger, UnitLedger
from cluster.accounting.saving import Saving, saving_of
from cluster.accounting.speedup import NANO, MeasuredRatio
from cluster.errors import StoreError
from cluster.output.accuracy import (
    RECORDS,
    Accuracy,
    answers_of_records,
    measure,
    reference_column,
)
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.output.unit_file import UnitFooter

logger = structlog.get_logger(__name__)

_T = TypeVar("_T")

# Above this many rows keys are not compared: the set of them would not fit a driver's memory.
_KEYS_COMPARED = 5_000_000
_REASON_CHARACTERS = 300
# Units whose answers and references are in memory at once.
_UNITS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """How one invocation of a command went; the only part of a summary that is not in the store."""

    rows: int
    """Rows that this attempt had to do; of one that asked failed rows again, those it replaced."""
    wall_seconds: float
    """From the first read to the last commit, the start of the labelling actors included."""
    start_seconds: float
    """From the command's start to the first read."""
    rows_per_second: float
    """rows / wall_seconds."""
    replicas: int
    """Model replicas."""
    replica_busy_share: float | None
    """Share of wall_seconds in which an engine was working, mean over replicas; None if a replica
    was replaced meanwhile."""
    events: Mapping[str, int] = field(default_factory=dict)
    """Deaths, retries and waits by kind (`cluster.events.RunEvent`), as far as they were reported:
    telemetry, unlike the rows."""
    not_measured: str | None = None
    """Why no saving was measured, or on fewer blocks than were asked for; None elsewhere, for a
    dense run, and where failed rows were asked again."""
    asked_again: bool = False
    """Whether it asked failed rows again, and nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What asking failed rows again did, over all units in which they were asked as often."""

    number: int
    """1 for the first time that a unit's rows were asked again."""
    units: int
    """Units that have this generation."""
    asked: int
    """Rows that were asked again."""
    mended: int
    """Rows among them that succeeded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run as of now. Modelled figures come from the model's config, measured ones from
    clocks."""

    run_id: str
    """See `Identity.run_id`."""
    created: str
    """When the run was first planned, ISO 8601 in UTC."""
    settings: Mapping[str, Any]
    """The run's identity settings."""
    input: str
    """URI of the corpus."""
    output: str
    """URI of the output."""
    units: int
    """Planned units."""
    units_done: int
    """Committed units."""
    rows_planned: int
    """Planned rows."""
    total: UnitLedger
    """Sum over the committed units."""
    measured: MeasuredRatio | None
    """Dense over pruned seconds; None until a control block is committed."""
    duplicate_keys: int | None
    """Rows whose key another row has too; None where there are too many rows to compare."""
    accuracy: Accuracy | None
    """Of a VQA run with references; None elsewhere."""
    dtype: str | None = None
    """Of the model's weights; None for a run that named none and had no replicas yet."""
    attempt: Attempt | None = None
    """The attempt that wrote this summary; None where it was read from the output."""
    not_measured: str | None = None
    """Why the latest attempt measured no saving, or less than was asked for."""
    break_even: BreakEven | None = None
    """The decision of a run that decides by measurement, once made."""
    unread_bytes: int = 0
    """Damaged bytes of the corpus; each damaged range is one of the rows that failed."""
    generations: tuple[Generation, ...] = ()
    """Of the rows that were asked again; empty where none were."""
    foreign: tuple[str, ...] = ()
    """Addresses of objects that readers of the prefix read beside the run's rows, or fail on."""
    unavailable: Mapping[str, str] = field(default_factory=dict)
    """Parts of this summary that could not be made, with the reason."""

    @property
    def state(self) -> str:
        """incomplete, completed or completed_with_errors."""
        if self.units_done < self.units:
            return "incomplete"
        return "completed_with_errors" if self.total.rows_failed else "completed"

    @property
    def saving(self) -> Saving | None:
        """The replica time that pruning saved; None where `measured` is."""
        return None if self.measured is None else saving_of(self.measured, self.total)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `_run/summary.json` and `report.py --json` have them."""
        total = self.total
        modelled = {
            "flops": dict(total.flops),
            "flops_dense": dict(total.flops_dense),
            "kv_bytes": total.kv_bytes,
            "kv_bytes_dense": total.kv_bytes_dense,
            "flops_cached": dict(total.flops_cached),
        }
        measured = {
            "seconds": total.seconds,
            "seconds_by_device": {
                device: spent / NANO for device, spent in total.nanoseconds_by_device.items()
            },
            "control_blocks": len(total.blocks),
            "control_blocks_spoiled": total.blocks_spoiled,
            "control_rows": total.control_rows,
            "control_agreements": total.agreements,
            "control_seconds": total.control_seconds,
            "retry_seconds": total.retry_seconds,
            "images_cached": total.images_cached,
            "prefixes_cached": total.prefixes_cached,
            "dense_over_pruned": None if self.measured is None else asdict(self.measured),
            "saving": None if self.saving is None else asdict(self.saving),
        }
        return {
            "run_id": self.run_id,
            "state": self.state,
            "created": self.created,
            "input": self.input,
            "output": self.output,
            "settings": dict(self.settings),
            "dtype": self.dtype,
            "units": self.units,
            "units_done": self.units_done,
            "rows_planned": self.rows_planned,
            "unread_bytes": self.unread_bytes,
            "rows": total.rows,
            "rows_failed": dict(total.failed),
            "rows_recomputed": total.recomputed,
            "duplicate_keys": self.duplicate_keys,
            "visual_tokens": total.visual_tokens,
            "visual_tokens_kept": total.visual_tokens_kept,
            "prompt_tokens": total.prompt_tokens,
            "completion_tokens": total.completion_tokens,
            "modelled": modelled,
            "measured": measured,
            "break_even": None if self.break_even is None else self.break_even.to_dict(),
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "attempt": None if self.attempt is None else asdict(self.attempt),
            "not_measured": self.not_measured,
            "generations": [asdict(generation) for generation in self.generations],
            "foreign_objects": list(self.foreign),
            "unavailable": dict(self.unavailable),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)


def summarise(
    output: str | os.PathLike[str] | RunOutput, attempt: Attempt | None = None
) -> Summary:
    """The summary of the run in an output prefix.

    output: its URI, or the output itself. attempt: how the present invocation went, if any. Raises
    UsageError for a prefix that holds no run, StoreError where manifest or ledgers cannot be read.
    What else fails is named in `unavailable`: a finished run is not failed by a figure about it.
    """
    if not isinstance(output, RunOutput):
        output = RunOutput.open(output)
    manifest = output.require_manifest()
    planned = {unit.unit_id for unit in manifest.units}
    done = sorted(output.committed_units() & planned)
    footers = output.footers(done)
    ledger = RunLedger.of(footer.ledger for footer in footers)
    unavailable: dict[str, str] = {}

    def optional(part: str, make: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return make()
        except Exception as error:  # of hostile rows, of a store that gave up, of too much memory
            logger.warning("summary_part_unavailable", part=part, error=repr(error))
            unavailable[part] = f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]
            return otherwise

    duplicate_keys = None
    if ledger.total.rows > _KEYS_COMPARED:
        unavailable["keys"] = f"more than {_KEYS_COMPARED:,} rows to compare"
    elif done:
        duplicate_keys = optional("keys", lambda: _count_duplicates(output, done), None)
    return Summary(
        run_id=manifest.run_id,
        created=manifest.created,
        settings=manifest.identity.settings,
        dtype=optional("dtype", lambda: _dtype(output, manifest), None),
        input=manifest.source,
        output=output.uri,
        units=len(manifest.units),
        units_done=len(done),
        rows_planned=manifest.rows,
        unread_bytes=manifest.unread_bytes,
        total=ledger.total,
        measured=ledger.measured_ratio(),
        duplicate_keys=duplicate_keys,
        accuracy=optional("accuracy", lambda: _accuracy(output, manifest, done), None),
        attempt=attempt,
        not_measured=(
            optional("not_measured", lambda: _told_reason(output), None)
            if attempt is None or attempt.asked_again
            else attempt.not_measured
        ),
        break_even=optional("break-even", output.break_even, None),
        generations=_generations(footers),
        foreign=optional("foreign", lambda: tuple(output.foreign_objects(planned)), ()),
        unavailable=unavailable,
    )


def _told_reason(output: RunOutput) -> str | None:
    """What the summary of the latest attempt says of it."""
    stored = output.summary()
    reason = None if stored is None else json.loads(stored).get("not_measured")
    return reason if isinstance(reason, str) else None


def is_current(stored: bytes | None, summary: Summary) -> bool:
    """Whether a summary that was written before says of the rows what this one says: whoever wrote
    it may have been killed before it wrote the next one."""
    try:
        before = json.loads(stored or b"")
        return all(before[name] == value for name, value in _of_rows(summary).items())
    except (ValueError, KeyError, TypeError):
        return False


def _of_rows(summary: Summary) -> dict[str, Any]:
    now = summary.to_dict()
    return {name: now[name] for name in ("units_done", "rows", "rows_failed", "generations")}


def keep_summary(output: RunOutput, summary: Summary) -> None:
    """Writes the summary beside the run's rows. A store that refuses is only logged: the rows are
    committed, and the next invocation writes the summary."""
    try:
        output.put_summary(summary.to_json())
    except StoreError as error:
        logger.warning("summary_not_written", run_id=summary.run_id, error=str(error))


def _generations(footers: Sequence[UnitFooter]) -> tuple[Generation, ...]:
    found = []
    for number in range(max((len(footer.retries) for footer in footers), default=0)):
        retries = [footer.retries[number] for footer in footers if len(footer.retries) > number]
        found.append(
            Generation(
                number=number + 1,
                units=len(retries),
                asked=sum(retry.asked for retry in retries),
                mended=sum(retry.mended for retry in retries),
            )
        )
    return tuple(found)


def _dtype(output: RunOutput, manifest: Manifest) -> str | None:
    named: str | None = manifest.identity.settings.get("dtype")
    return named or output.dtype()


def _count_duplicates(output: RunOutput, done: list[str]) -> int:
    keys = pa.concat_tables(output.read_units(done, ["key"]))["key"]
    counts = pc.value_counts(keys.combine_chunks()).field("counts")
    return int(pc.sum(pc.if_else(pc.greater(counts, 1), counts, 0)).as_py() or 0)


def _accuracy(output: RunOutput, manifest: Manifest, done: list[str]) -> Accuracy | None:
    """Of a VQA run with references, of however many rows."""
    references = reference_column(manifest.mapping) if manifest.kind == "vqa" else None
    if references is None:
        return None
    measured = measure(_answers(output, done, references))
    return measured if measured.scored else None


def _answers(
    output: RunOutput, done: list[str], references: str
) -> Iterator[tuple[str | None, object]]:
    """Each row's answer and references."""
    for table in output.iterate_units(done, ["answer", references], at_once=_UNITS_AT_ONCE):
        known = table[references]
        if references == RECORDS:
            known = answers_of_records(known)
        yield from zip(table["answer"].to_pylist(), known.to_pylist(), strict=True)
