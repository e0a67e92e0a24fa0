"""Calibration: whether pruning pays, measured before a run labels anything, on its own model,
rows and load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from math import fsum
from typing import Final

import structlog

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.control_plan import ControlPlan
from cluster.accounting.speedup import FEWEST_BLOCKS, Block
from cluster.config import RunConfig
from cluster.corpus.prompts import build_prompt
from cluster.corpus.source import read_unit
from cluster.corpus.table import input_rows
from cluster.corpus.unit import Unit
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.protocol import BatchReplicas, LabelRequest, call_rows
from cluster.runs.admission import Admission
from cluster.runs.dispatch import AttemptedRow, Dispatcher
from cluster.store import open_store

logger = structlog.get_logger(__name__)

# Blocks, each measured both ways.
_BLOCKS: Final = 6


def calibrate(
    config: RunConfig,
    manifest: Manifest,
    todo: Sequence[Unit],
    output: RunOutput,
    replicas: BatchReplicas,
    *,
    slots: int,
) -> BreakEven:
    """The run's decision: the one in its output, or a new one, measured on control blocks of the
    run's own rows, of units drawn by hash from all that are left. Answers are discarded. Where
    fewer units are left than an interval has blocks, the run is dense without measuring.
    """
    decided = output.break_even()
    if decided is not None:
        return decided
    blocks, seconds = asyncio.run(_measure(config, manifest, todo, replicas, slots=slots))
    decision = BreakEven.from_blocks(blocks, seconds=seconds)
    rows = 0 if decision.measured is None else decision.measured.rows
    logger.info("break_even", run_id=manifest.run_id, pays=decision.pays, rows=rows)
    return output.keep_break_even(decision)


async def _measure(
    config: RunConfig,
    manifest: Manifest,
    todo: Sequence[Unit],
    replicas: BatchReplicas,
    *,
    slots: int,
) -> tuple[list[Block], float]:
    """The blocks that were measured, one after another, and the replica time of all answers."""
    plan = ControlPlan.of(
        f"break-even {manifest.run_id}",
        ((unit.unit_id, unit.row_count) for unit in todo),
        slots=slots,
        asked=_BLOCKS,
    )
    units = {unit.unit_id: unit for unit in todo}
    dispatcher = Dispatcher(replicas, admission=Admission(rows=1), max_attempts=config.max_attempts)
    blocks, seconds = list[Block](), 0.0
    if len(plan.ranks) < FEWEST_BLOCKS:
        return blocks, seconds
    for unit_id in list(plan.ranks)[: 2 * _BLOCKS]:  # some may be spoiled
        requests = _requests(config, manifest, units[unit_id])
        drawn = set(plan.draw(unit_id, range(len(requests))))
        rows = await dispatcher.dispatch_block(
            [request for number, request in enumerate(requests) if number in drawn],
            dense_first=plan.dense_first(unit_id),
            call_rows=call_rows(slots),
        )
        blocks += _block(rows)
        seconds += fsum(row.result.seconds + row.discarded_seconds for row in rows)
        seconds += fsum(row.dense.seconds for row in rows if row.dense is not None)
        if len(blocks) == _BLOCKS:
            break
    return blocks, seconds


def _block(rows: Sequence[AttemptedRow]) -> list[Block]:
    paired = [row for row in rows if row.dense is not None]
    return Block.at_pace(
        [row.steady_seconds for row in paired],
        [row.dense_steady_seconds for row in paired],
        rows=len(paired),
        device=(paired[0].result.device or "") if paired else "",
    )


def _requests(config: RunConfig, manifest: Manifest, unit: Unit) -> list[LabelRequest]:
    """The rows of a unit that can be sent."""
    requests = []
    for row in input_rows(read_unit(open_store(manifest.source), unit, manifest.mapping)):
        prompt = build_prompt(config.kind, config.prompt, row["_in_prompt"])
        if prompt is None or row["_in_error_code"] is not None:
            continue
        requests.append(
            LabelRequest(
                id=f"break-even:{unit.unit_id}:{row['_in_row']}",
                prompt=prompt,
                images=(row["_in_image"],),
                spec=config.spec,
                generation=config.generation,
                media=config.media,
            )
        )
    return requests
