"""The Ray Data stage between reader and sink: units in, labelled units out, every row once.

One or a few CPU actors run it. Calls of several units overlap, so that replicas stay full from one
unit to the next. Few units hold a control block, which one replica answers both ways.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, Final

import pyarrow as pa
import structlog
from ray import serve
from ray.data import ActorPoolStrategy, Dataset

from cluster.accounting.control_plan import ControlPlan
from cluster.config import RunConfig
from cluster.controller import RunName, may_measure, report_event, stop_reason
from cluster.corpus.packed import PACKED_SCHEMA, pack_unit, unpack_units
from cluster.corpus.prompts import build_prompt
from cluster.corpus.table import input_rows
from cluster.errors import ErrorShareExceeded, PromptInvalid
from cluster.protocol import (
    BatchReplicas,
    LabelRequest,
    call_rows,
    row_error_result,
    rows_waiting,
)
from cluster.runs.admission import Admission
from cluster.runs.dispatch import AttemptedRow, Dispatcher
from cluster.runs.replica_wait import ReplicaWait
from cluster.schema import (
    PLANNED_FIELD,
    UNIT_FIELD,
    is_internal,
    output_schema,
)
from cluster.serving.client import ServeReplicas
from cluster.serving.serve_state import live_replicas
from sppruner.cost import PARTS, RowCost
from sppruner.engine.interface import Result

logger = structlog.get_logger(__name__)

LABELLER_CPUS: Final = 0.25
"""Of one actor. Must differ from the reader's: with equal resources Ray Data fuses both stages,
and every read would block the event loop that drives the calls."""

# Fewest units that one actor works on at a time: the next unit's calls start before this one's end.
_MIN_UNITS: Final = 4
# Of large units it works on fewer, by bytes, and on two in any case.
_UNIT_BYTES_AT_ONCE: Final = 2**30
# Bytes of images that one actor has in flight, so that neither it nor the replicas hold gigabytes:
# 64 slots and 32 waiting rows of 0.5 MB images fit, and of larger images fewer rows wait.
_BYTES_IN_FLIGHT: Final = 256 * 2**20
_BYTES_IN_FLIGHT_PER_REPLICA: Final = 64 * 2**20
# One event loop serialises the images of so many replicas without being what they wait for.
_REPLICAS_PER_ACTOR: Final = 8
_POLL_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LabellerSettings:
    """What a labelling actor needs."""

    name: RunName
    """The run, for logs, control sampling and committed rows."""
    config: RunConfig
    """The run's settings."""
    model_revision: str
    """Content hash or commit of the model, for committed rows."""
    control: ControlPlan | None = None
    """The control blocks that the run may have; None for none."""
    app: str
    """The Serve application of the replicas."""
    deployment: str
    """The replicas' deployment in it."""
    slots: int = 16
    """Rows that one replica runs at once."""
    replicas: int = 1
    """Replicas that the actors keep full together."""
    kv_token_capacity: int | None = None
    """Tokens that the replicas' KV caches hold together; None for no bound."""
    unit_rows: int = 256
    """Rows of a typical unit."""
    unit_bytes: int = 0
    """Bytes of a typical unit as read."""
    actors: int = 1
    """Labelling actors, which share the replicas evenly."""

    @property
    def rows_running(self) -> int:
        """Slots of one actor's share of the replicas."""
        return ceil(self.replicas * self.slots / self.actors)

    @property
    def rows_waiting(self) -> int:
        """Rows that one actor has in flight beside those in slots."""
        return ceil(self.replicas * rows_waiting(self.slots) / self.actors)

    @property
    def tokens(self) -> int | None:
        """One actor's share of the tokens; None for no bound."""
        return None if self.kv_token_capacity is None else self.kv_token_capacity // self.actors

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of images that one actor has in flight at most."""
        return _BYTES_IN_FLIGHT + ceil(_BYTES_IN_FLIGHT_PER_REPLICA * self.replicas / self.actors)

    @property
    def units_at_once(self) -> int:
        """Units that hold all rows that one actor may have in flight, and one more, as far as they
        take about 1 GiB."""
        rows = self.rows_running + self.rows_waiting
        by_rows = max(_MIN_UNITS, 1 + ceil(rows / max(1, self.unit_rows)))
        return max(2, min(by_rows, _UNIT_BYTES_AT_ONCE // max(1, self.unit_bytes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnitRow:
    """One row of a unit as read; `error` is set where it cannot be sent."""

    unit: str
    number: int
    key: str
    image: bytes | None
    prompt: str | None
    error: Result | None


class Labeller:
    """The class that Ray Data runs; `label_units` sets it up."""

    def __init__(
        self,
        settings: LabellerSettings,
        replicas: BatchReplicas | None = None,
        live: Callable[[], Awaitable[int | None]] | None = None,
    ) -> None:
        """replicas: None for those that the settings name; tests pass doubles. live: how many of
        them live, or None where that is unknown; by default Serve is asked."""
        self._name = settings.name
        self._config = settings.config
        self._settings = settings
        # One at a time: while a replica answers a block, other batch rows of it wait.
        self._measuring = asyncio.Lock()
        if replicas is None:
            handle = serve.get_deployment_handle(settings.deployment, settings.app)
            replicas = ServeReplicas(handle)
            live = live or partial(live_replicas, settings.app, settings.deployment)
        self._live = live
        self._resizing: asyncio.Task[None] | None = None
        report = partial(report_event, settings.name)
        self._replica_wait = ReplicaWait(report)
        self._admission = Admission(
            rows=settings.rows_running,
            tokens=settings.tokens,
            waiting=settings.rows_waiting,
            size=settings.bytes_in_flight,
            replicas=settings.replicas,
        )
        self._dispatcher = Dispatcher(
            replicas,
            admission=self._admission,
            max_attempts=settings.config.max_attempts,
            report=report,
        )

    async def __call__(self, block: pa.Table) -> pa.Table:
        """Labels the packed units of a block. Raises what `label_unit` raises, and FleetUnavailable
        once no replica was up for long."""
        if self._resizing is None:
            self._resizing = asyncio.create_task(self._keep_resizing())
        labelling = asyncio.gather(*(self.label_unit(table) for table in unpack_units(block)))
        try:
            await asyncio.wait((labelling, self._resizing), return_when=asyncio.FIRST_COMPLETED)
            if not labelling.done():
                self._resizing.result()  # it ends with what ends the run
            tables = await labelling
        finally:
            if labelling.cancel():
                await asyncio.gather(labelling, return_exceptions=True)
        return pa.concat_tables([PACKED_SCHEMA.empty_table(), *map(pack_unit, tables)])

    async def resize_to_live(self) -> None:
        """Admits from now on as much as the replicas that live can hold; where their number is
        unknown, as much as before. Raises FleetUnavailable once none was up for long."""
        if self._live is None:
            return
        count = None
        try:
            count = await self._live()
        except Exception as error:  # of Ray or Serve: their controller may be restarting
            logger.warning("live_replicas_unknown", error=type(error).__name__)
        self._replica_wait.observe(count, asyncio.get_running_loop().time())
        if count is not None:
            await self._admission.resize(count)

    async def _keep_resizing(self) -> None:
        while True:
            await self.resize_to_live()
            await asyncio.sleep(_POLL_SECONDS)

    async def label_unit(self, table: pa.Table) -> pa.Table:
        """Labels one unit: the same rows in the same order come out. Raises ErrorShareExceeded once
        the run's controller says so, and FleetUnstable."""
        # One that nothing stops does not ask: the answer would be about another's attempt.
        reason = await stop_reason(self._name) if self._config.is_guarded else None
        if reason is not None:
            raise ErrorShareExceeded(reason)
        rows = [self._unit_row(values) for values in input_rows(table)]
        if not rows:
            return self._labelled_table(table, [], [])
        sendable = [row for row in rows if row.error is None]
        slots = self._settings.slots
        block = await self._control_block(sendable)
        drawn = {row.number for row in block}
        plain = [row for row in sendable if row.number not in drawn]
        chunks = _chunks(plain, call_rows(slots))
        answers = [self._dispatcher.dispatch([*map(self._request, c)]) for c in chunks]
        if block:
            chunks.append(block)
            answers.append(self._measure(block))
        attempted = await asyncio.gather(*answers)
        outcomes = {
            row.number: outcome
            for chunk, results in zip(chunks, attempted, strict=True)
            for row, outcome in zip(chunk, results, strict=True)
        }
        outcomes |= {
            row.number: AttemptedRow(result=row.error, attempts=0) for row in rows if row.error
        }
        logger.debug(
            "unit_labelled", run_id=self._name.run_id, unit_id=rows[0].unit, rows=len(rows)
        )
        return self._labelled_table(table, rows, [outcomes[row.number] for row in rows])

    async def _control_block(self, rows: Sequence[_UnitRow]) -> Sequence[_UnitRow]:
        """The rows to be answered both ways; none for most units."""
        plan = self._settings.control
        if plan is None or not rows:
            return []
        unit = rows[0].unit
        drawn = set(plan.draw(unit, [row.number for row in rows]))
        if not drawn or not await may_measure(self._name, unit):
            return []
        return [row for row in rows if row.number in drawn]

    async def _measure(self, block: Sequence[_UnitRow]) -> list[AttemptedRow]:
        plan = self._settings.control
        assert plan is not None
        async with self._measuring:
            return await self._dispatcher.dispatch_block(
                [*map(self._request, block)],
                dense_first=plan.dense_first(block[0].unit),
                call_rows=call_rows(self._settings.slots),
            )

    def _unit_row(self, values: dict[str, Any]) -> _UnitRow:
        id = f"{values['_in_unit']}:{values['_in_row']}"
        prompt = build_prompt(self._config.kind, self._config.prompt, values["_in_prompt"])
        error = None
        if values["_in_error_code"] is not None:
            error = Result(
                id=id,
                text=None,
                error_code=values["_in_error_code"],
                error_message=values["_in_error_message"],
                error_stage=values["_in_error_stage"],
            )
        elif prompt is None:
            error = row_error_result(id, PromptInvalid("the row has no question"))
        return _UnitRow(
            unit=values["_in_unit"],
            number=values["_in_row"],
            key=values["_in_key"],
            image=values["_in_image"],
            prompt=prompt,
            error=error,
        )

    def _request(self, row: _UnitRow) -> LabelRequest:
        assert row.prompt is not None
        return LabelRequest(
            id=f"{row.unit}:{row.number}",
            prompt=row.prompt,
            images=(row.image,),
            spec=self._config.spec,
            generation=self._config.generation,
            media=self._config.media,
        )

    def _labelled_table(
        self, table: pa.Table, rows: Sequence[_UnitRow], outcomes: Sequence[AttemptedRow]
    ) -> pa.Table:
        """The source's columns, the output's, and the internal ones that the sink needs."""
        labelled = table.select([name for name in table.column_names if not is_internal(name)])
        values = [self._values(row, outcome) for row, outcome in zip(rows, outcomes, strict=True)]
        added = output_schema(pa.schema([]), self._config.kind)
        columns = {name: [v.get(name) for v in values] for name in added.names}
        if self._config.kind == "vqa":
            questions = table.column("_in_prompt").to_pylist()
            columns |= {"question": questions, "answer": columns["text"]}
        output = pa.table(columns, schema=added)
        for field in output.schema:
            labelled = labelled.append_column(field, output.column(field.name))
        for field in (UNIT_FIELD, PLANNED_FIELD):
            labelled = labelled.append_column(field, table.column(field.name))
        return labelled

    def _values(self, row: _UnitRow, outcome: AttemptedRow) -> dict[str, Any]:
        result = outcome.result
        common = {
            "key": row.key,
            "error_code": result.error_code,
            "error_message": result.error_message,
            "error_stage": result.error_stage,
            "attempts": outcome.attempts,
            "is_control": outcome.in_block,
            "discarded_seconds": outcome.discarded_seconds,
            "model": self._config.model,
            "model_revision": self._settings.model_revision,
            "run_id": self._name.run_id,
            "unit_id": row.unit,
            "unit_row": row.number,
        }
        if result.error_code is not None:
            # Nothing was generated: token counts and seconds are null rather than zero.
            return common
        spec, dense = self._config.spec, outcome.dense
        cost = {} if result.cost is None else _cost_columns(result.cost)
        return (
            common
            | cost
            | {
                "text": result.text,
                "finish_reason": result.finish_reason,
                "prompt_tokens": result.prompt_tokens,
                "completion_tokens": result.completion_tokens,
                "visual_tokens": result.visual_tokens,
                "visual_tokens_kept": result.visual_tokens_kept,
                "kept_tokens": result.kept_tokens,
                "prune_method": spec.method,
                "prune_spec": spec.to_json(),
                "seconds": result.seconds,
                "device": result.device,
                "control_text": None if dense is None else dense.text,
                "control_seconds": None if dense is None else dense.seconds,
                "steady_seconds": outcome.steady_seconds,
                "control_steady_seconds": outcome.dense_steady_seconds,
            }
        )


def label_units(units: Dataset, settings: LabellerSettings, *, actors: int = 1) -> Dataset:
    """The labelling stage: every unit of `units` labelled, with the columns that `CommitSink`
    takes.

    units: as `cluster.corpus.source.read_units` gives them. actors: labelling actors, which share
    the replicas evenly; see `actors_for`.
    """
    settings = replace(settings, actors=actors)
    return units.map_batches(
        Labeller,
        fn_constructor_kwargs={"settings": settings},
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=actors,
            max_concurrent_calls_per_actor=settings.units_at_once,
            max_tasks_in_flight_per_actor=2 * settings.units_at_once,
        ),
        num_cpus=LABELLER_CPUS,
    )


def actors_for(replicas: int) -> int:
    """Labelling actors that keep so many replicas full."""
    return ceil(replicas / _REPLICAS_PER_ACTOR)


def _cost_columns(cost: RowCost) -> dict[str, Any]:
    columns = cost.to_dict()
    for name in ("flops", "flops_dense", "flops_cached"):
        columns[name] = {part: columns[name].get(part, 0) for part in PARTS}
    return columns


def _chunks(rows: Sequence[_UnitRow], size: int) -> list[Sequence[_UnitRow]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
