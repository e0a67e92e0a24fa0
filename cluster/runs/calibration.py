"""Measuring, before a run labels anything, whether pruning pays: its own model, rows and load."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

import structlog

from cluster.accounting.breakeven import BreakEven, keep_break_even, read_break_even
from cluster.accounting.ledger import measured_ratio, nanoseconds
from cluster.config import RunConfig
from cluster.corpus.source import read_unit
from cluster.corpus.unit import Unit
from cluster.protocol import LabelRequest, Replicas, RowAnswer
from cluster.runs.admission import Admission
from cluster.runs.dispatch import Dispatcher
from cluster.runs.labeller import prompt_of
from cluster.runs.planning import Plan
from cluster.store import Store, open_store

logger = structlog.get_logger(__name__)

# Batches that are timed, behind one that is not: the first of a shape pays for allocations.
_BATCHES: Final = 6
# Measuring takes no more than this share of the rows, but batches have so many at least.
_SHARE: Final = 0.05
_LEAST_ROWS: Final = 16


def calibrate(
    config: RunConfig,
    plan: Plan,
    todo: Sequence[Unit],
    store: Store,
    replicas: Replicas,
    *,
    batch_rows: int,
) -> BreakEven:
    """The run's choice: the one that was made before, or a new one, measured on rows of `todo` in
    batches of as many as a replica has slots, or of fewer where there are few rows. Their answers
    are thrown away."""
    if (known := read_break_even(store)) is not None:
        return known
    share = _SHARE * sum(unit.row_count for unit in todo) / (1 + _BATCHES)
    batch_rows = min(batch_rows, max(_LEAST_ROWS, int(share)))
    answers = asyncio.run(_answers(config, _calls(config, plan, todo), replicas, batch_rows))
    pairs = [
        (nanoseconds(answer.seconds), nanoseconds(answer.control_seconds))
        for answer in answers
        if answer.control_seconds is not None
    ]
    chosen = BreakEven(measured=measured_ratio(pairs))
    logger.info("break_even", run_id=plan.run_id, pays=chosen.pays, rows=len(pairs))
    return keep_break_even(store, chosen, writer=uuid.uuid4().hex)


async def _answers(
    config: RunConfig, calls: Iterator[LabelRequest], replicas: Replicas, batch_rows: int
) -> list[RowAnswer]:
    """Of the batches that count, one after the other: each had its replica to itself."""
    delivery = Dispatcher(replicas, credits=Admission(rows=1), max_attempts=config.max_attempts)
    answers: list[RowAnswer] = []
    for number in range(1 + _BATCHES):
        batch = list(islice(calls, batch_rows))
        if len(batch) < batch_rows:
            break  # seconds of a batch that is not full would say nothing about full ones
        delivered = await delivery.deliver(batch)
        answers += [one.answer for one in delivered] if number else ()
    return answers


def _calls(config: RunConfig, plan: Plan, todo: Sequence[Unit]) -> Iterator[LabelRequest]:
    """Rows that can be asked about, as control calls."""
    source = open_store(plan.input_uri)
    for unit in todo:
        table = read_unit(source, unit, plan.layout)
        names = ["_in_row", "_in_image", "_in_prompt", "_in_error_code"]
        for row in table.select(names).to_pylist():
            prompt = prompt_of(config.kind, config.prompt, row["_in_prompt"])
            if prompt is None or row["_in_error_code"] is not None:
                continue
            yield LabelRequest(
                id=f"break-even:{unit.unit_id}:{row['_in_row']}",
                prompt=prompt,
                images=(row["_in_image"],),
                spec=config.spec,
                generation=config.generation,
                control=True,
                media=config.media,
            )
