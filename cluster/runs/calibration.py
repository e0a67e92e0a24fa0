"""Calibration: whether pruning pays, measured before a run labels anything, on its own model,
rows and load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

import structlog

from cluster.accounting.breakeven import BreakEven
from cluster.config import RunConfig
from cluster.corpus.prompts import build_prompt
from cluster.corpus.source import read_unit
from cluster.corpus.table import input_rows
from cluster.corpus.unit import Unit
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.protocol import BatchReplicas, LabelRequest
from cluster.runs.admission import Admission
from cluster.runs.dispatch import Dispatcher
from cluster.store import open_store
from sppruner.engine.interface import Result

logger = structlog.get_logger(__name__)

# Timed batches, after one that is not: the first of a shape pays for allocations.
_BATCHES: Final = 6
# Share of the rows that measuring takes at most; batches have _MIN_ROWS rows in any case.
_MAX_SHARE: Final = 0.05
_MIN_ROWS: Final = 16


def calibrate(
    config: RunConfig,
    manifest: Manifest,
    todo: Sequence[Unit],
    output: RunOutput,
    replicas: BatchReplicas,
    *,
    slots: int,
) -> BreakEven:
    """The run's decision: the one in its output, or a new one, measured on rows of `todo` in
    batches as large as a replica's slots, or smaller for a small corpus. Answers are discarded.
    """
    decided = output.break_even()
    if decided is not None:
        return decided
    share = _MAX_SHARE * sum(unit.row_count for unit in todo) / (1 + _BATCHES)
    batch_rows = min(slots, max(_MIN_ROWS, int(share)))
    requests = _control_requests(config, manifest, todo)
    results = asyncio.run(_time_batches(config, requests, replicas, batch_rows))
    decision = BreakEven.from_results(results)
    rows = 0 if decision.measured is None else decision.measured.rows
    logger.info("break_even", run_id=manifest.run_id, pays=decision.pays, rows=rows)
    return output.keep_break_even(decision)


async def _time_batches(
    config: RunConfig, requests: Iterator[LabelRequest], replicas: BatchReplicas, batch_rows: int
) -> list[Result]:
    """Results of the timed batches, one after another: each has its replica to itself."""
    dispatcher = Dispatcher(replicas, admission=Admission(rows=1), max_attempts=config.max_attempts)
    results: list[Result] = []
    for number in range(1 + _BATCHES):
        batch = list(islice(requests, batch_rows))
        if len(batch) < batch_rows:
            break  # seconds of a partial batch say nothing about full ones
        attempted = await dispatcher.dispatch(batch)
        results += [row.result for row in attempted] if number else ()
    return results


def _control_requests(
    config: RunConfig, manifest: Manifest, todo: Sequence[Unit]
) -> Iterator[LabelRequest]:
    """Rows that can be sent, as control requests."""
    source = open_store(manifest.source)
    for unit in todo:
        for row in input_rows(read_unit(source, unit, manifest.mapping)):
            prompt = build_prompt(config.kind, config.prompt, row["_in_prompt"])
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
