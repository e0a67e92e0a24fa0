"""The Ray Data stage between reader and sink: units in, labelled units out, every row once.

One or a few CPU actors run it. Calls of several units overlap, so that replicas stay full from one
unit to the next. A share of rows, the same at every attempt, is sent as control: answered both
dense and pruned, in calls of their own.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import structlog
from ray import serve
from ray.data import ActorPoolStrategy, Dataset

from cluster.config import Kind, RunConfig
from cluster.controller import stop_reason
from cluster.errors import ErrorShareExceeded, PromptInvalid
from cluster.protocol import LabelRequest, Replicas, RowAnswer, ServeReplicas
from cluster.runs.admission import Admission, call_rows, rows_waiting
from cluster.runs.dispatch import AttemptedRow, Dispatcher
from cluster.schema import COST_FIELD, INPUT_FIELDS, is_internal, output_schema

logger = structlog.get_logger(__name__)

# Units one actor has in work at least: the next unit's calls start before this one's last end.
_UNITS_AT_ONCE = 4
# Anything but the reader's share of a CPU: with equal resources Ray Data would fuse the reader
# into this stage, and every read would stall the event loop that drives the calls.
LABELLER_CPUS = 0.25

_UNIT_FIELD = INPUT_FIELDS[0]
_QUESTION = "{question}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabellerSettings:
    """What a labeller needs. first_unit: the run's first, which always has control rows. replicas,
    batch_rows, kv_token_capacity: what one actor keeps full, slots and tokens as in `Fleet`.
    unit_rows: of a typical unit."""

    run_id: str
    first_unit: str
    config: RunConfig
    model_revision: str
    app: str
    deployment: str
    batch_rows: int = 16
    replicas: int = 1
    kv_token_capacity: int | None = None
    unit_rows: int = 256

    @property
    def rows_running(self) -> int:
        """Slots of all replicas."""
        return self.replicas * self.batch_rows

    @property
    def rows_waiting(self) -> int:
        """Rows on their way beside those that run."""
        return self.replicas * rows_waiting(self.batch_rows)

    @property
    def units_at_once(self) -> int:
        """Units that hold all rows that may be on their way, and one more."""
        rows = self.rows_running + self.rows_waiting
        return max(_UNITS_AT_ONCE, 1 + ceil(rows / max(1, self.unit_rows)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    unit: str
    number: int
    key: str
    image: bytes | None
    prompt: str | None
    error: RowAnswer | None


class Labeller:
    """The class Ray Data runs (`label_units` sets it up). `replicas` is for tests."""

    def __init__(self, settings: LabellerSettings, replicas: Replicas | None = None) -> None:
        self._run_id = settings.run_id
        self._config = settings.config
        self._settings = settings
        self._delivery = Dispatcher(
            replicas
            or ServeReplicas(serve.get_deployment_handle(settings.deployment, settings.app)),
            credits=Admission(
                rows=settings.rows_running,
                tokens=settings.kv_token_capacity,
                waiting=settings.rows_waiting,
            ),
            max_attempts=settings.config.max_attempts,
        )

    async def __call__(self, table: pa.Table) -> pa.Table:
        """Whole units in, the same rows in the same order out. Ray Data hands over one block, and
        the reader makes one block per unit; blocks that hold several units are taken apart.

        Raises ErrorShareExceeded once the run's controller says so.
        """
        names = table.column(_UNIT_FIELD.name)
        units = names.unique().to_pylist()
        if len(units) == 1:
            return await self._label_unit(table)
        parts = [self._label_unit(table.filter(pc.equal(names, unit))) for unit in units]
        empty = self._outcome(table.slice(0, 0), [], [])
        return pa.concat_tables([empty, *await asyncio.gather(*parts)])

    async def _label_unit(self, table: pa.Table) -> pa.Table:
        reason = await stop_reason(self._run_id)
        if reason is not None:
            raise ErrorShareExceeded(reason)
        rows = [self._row(values) for values in table.select(_INPUT_NAMES).to_pylist()]
        controls = self._controls(rows)
        plain = [row for row in rows if row.error is None and row.number not in controls]
        control = [row for row in rows if row.number in controls]
        chunks = [
            *_chunks(plain, call_rows(self._settings.batch_rows)),
            *_chunks(control, self._settings.batch_rows),
        ]
        calls = [[self._call(row, control=row.number in controls) for row in c] for c in chunks]
        answered = await asyncio.gather(*(self._delivery.deliver(call) for call in calls))
        outcomes = {
            row.number: delivered
            for chunk, answers in zip(chunks, answered, strict=True)
            for row, delivered in zip(chunk, answers, strict=True)
        }
        outcomes |= {
            row.number: AttemptedRow(answer=row.error, attempts=0) for row in rows if row.error
        }
        logger.debug("unit_labelled", run_id=self._run_id, unit_id=rows[0].unit, rows=len(rows))
        return self._outcome(table, rows, [outcomes[row.number] for row in rows])

    def _row(self, values: dict[str, Any]) -> _Row:
        id = f"{values['_in_unit']}:{values['_in_row']}"
        prompt = prompt_of(self._config.kind, self._config.prompt, values["_in_prompt"])
        error = None
        if values["_in_error_code"] is not None:
            error = RowAnswer(
                id=id,
                error_code=values["_in_error_code"],
                error_message=values["_in_error_message"],
                error_stage=values["_in_error_stage"],
            )
        elif prompt is None:
            error = RowAnswer.from_error(id, PromptInvalid("the row has no question"))
        return _Row(
            unit=values["_in_unit"],
            number=values["_in_row"],
            key=values["_in_key"],
            image=values["_in_image"],
            prompt=prompt,
            error=error,
        )

    def _controls(self, rows: Sequence[_Row]) -> frozenset[int]:
        """Row numbers of the unit that also run dense, the same ones at every attempt.

        They come in whole calls, as long as the slots or else the unit: seconds measured on a batch
        of two would say nothing about batches of sixteen. The share is kept over many units, a
        fraction of a call being drawn by hash; the run's first unit always has one. A dense run is
        its own control.
        """
        share = self._config.control_share
        numbers = [row.number for row in rows if row.error is None]
        if not share or not numbers or self._config.spec.is_dense:
            return frozenset()
        unit, size = rows[0].unit, min(self._settings.batch_rows, len(numbers))
        calls, rest = divmod(share * len(numbers) / size, 1)
        calls += self._draw(unit, "calls") < rest
        if unit == self._settings.first_unit:
            calls = max(calls, 1)
        drawn = sorted(numbers, key=lambda number: self._draw(unit, number))
        return frozenset(drawn[: int(calls) * size])

    def _draw(self, *what: object) -> float:
        """A number in [0, 1) that depends on the run and on `what` alone."""
        text = "\0".join(map(str, (self._run_id, *what)))
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def _call(self, row: _Row, *, control: bool) -> LabelRequest:
        assert row.prompt is not None
        return LabelRequest(
            id=f"{row.unit}:{row.number}",
            prompt=row.prompt,
            images=(row.image,),
            spec=self._config.spec,
            generation=self._config.generation,
            control=control,
            media=self._config.media,
        )

    def _outcome(
        self, table: pa.Table, rows: Sequence[_Row], delivered: Sequence[AttemptedRow]
    ) -> pa.Table:
        """The source's columns, the output's, and what the sink needs besides."""
        source = table.select([name for name in table.column_names if not is_internal(name)])
        values = [self._values(row, d) for row, d in zip(rows, delivered, strict=True)]
        asked = table.column("_in_prompt").to_pylist()
        added = output_schema(pa.schema([]), self._config.kind)
        columns = {name: [v.get(name) for v in values] for name in added.names}
        if self._config.kind == "vqa":
            columns |= {"question": asked, "answer": columns["text"]}
        outcome = pa.table(columns, schema=added)
        for field in outcome.schema:
            source = source.append_column(field, outcome.column(field.name))
        source = source.append_column(_UNIT_FIELD, table.column(_UNIT_FIELD.name))
        costs = pa.array([d.answer.cost for d in delivered], COST_FIELD.type)
        return source.append_column(COST_FIELD, costs)

    def _values(self, row: _Row, delivered: AttemptedRow) -> dict[str, Any]:
        answer = delivered.answer
        common = {
            "key": row.key,
            "error_code": answer.error_code,
            "error_message": answer.error_message,
            "error_stage": answer.error_stage,
            "attempts": delivered.attempts,
            "is_control": False,
            "model": self._config.model,
            "model_revision": self._settings.model_revision,
            "run_id": self._run_id,
            "unit_id": row.unit,
            "unit_row": row.number,
        }
        if answer.error_code is not None:
            # Nothing was generated: no token counts and no seconds, rather than zeros.
            return common
        spec = self._config.spec
        return common | {
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "visual_tokens": answer.visual_tokens,
            "visual_tokens_kept": answer.visual_tokens_kept,
            "kept_tokens": answer.kept_tokens,
            "prune_method": spec.method,
            "prune_spec": spec.to_json(),
            "seconds": answer.seconds,
            "is_control": answer.control_seconds is not None,
            "control_text": answer.control_text,
            "control_seconds": answer.control_seconds,
        }


def prompt_of(kind: Kind, prompt: str, asked: str | None) -> str | None:
    """What the model is asked about a row, given the run's prompt and what the row itself asks.

    Captions: the row's own prompt, else the run's. Questions: the row's, put where the run's
    prompt says {question}, if it does; None where there is no question.
    """
    if kind == "caption":
        return asked or prompt
    if asked is None or not asked.strip():
        return None
    return prompt.replace(_QUESTION, asked) if _QUESTION in prompt else asked


def _chunks(rows: Sequence[_Row], size: int) -> list[Sequence[_Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


_INPUT_NAMES = [field.name for field in INPUT_FIELDS]


def label_units(units: Dataset, settings: LabellerSettings, *, callers: int = 1) -> Dataset:
    """The stage itself: every unit of `units` labelled. With several callers each has the replicas
    that `settings` names to keep full."""
    return units.map_batches(
        Labeller,
        fn_constructor_kwargs={"settings": settings},
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=callers,
            max_concurrent_calls_per_actor=settings.units_at_once,
            max_tasks_in_flight_per_actor=2 * settings.units_at_once,
        ),
        num_cpus=LABELLER_CPUS,
    )
