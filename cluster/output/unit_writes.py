"""Writes of whole units in Ray's write tasks: on this node, or where the output is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import pyarrow as pa
import ray
import structlog
from ray.data.block import Block, BlockAccessor
from ray.exceptions import RayError

from cluster.corpus.packed import unpack_units
from cluster.errors import RunError
from cluster.events import OnEvent, RunEvent
from cluster.other_node import other_nodes
from cluster.output.run_output import RunOutput
from cluster.store.patience import hear_outages

logger = structlog.get_logger(__name__)

_T = TypeVar("_T")


def write_units(
    blocks: Iterable[Block],
    write: Callable[[pa.Table], _T],
    output: RunOutput,
    on_event: OnEvent,
) -> list[_T]:
    """What `write` returns of each packed unit that `blocks` hold. Where the output is not mounted
    on this node another one writes, and waits if need be. Raises what `write` raises, and
    StoreError where the output is another run's by now."""
    tables = [
        table
        for block in blocks
        for table in unpack_units(BlockAccessor.for_block(block).to_arrow())
    ]
    if not output.is_here():
        remote = ray.remote(_write_if_here)
        for node in other_nodes():
            placed = remote.options(num_cpus=0, scheduling_strategy=node)
            try:
                answer = ray.get(placed.remote(tables, write, output, on_event))
            except RayError as error:  # a write is repeatable: of two of one unit the first counts
                logger.warning("node_cannot_help", error=type(error).__name__)
                continue
            if isinstance(answer, RunError):
                raise answer
            if answer is not None:
                logger.warning("units_moved", uri=output.uri, units=len(tables))
                on_event(RunEvent.UNIT_MOVED, len(tables))
                return answer
    return _write_here(tables, write, output, on_event)


def _write_if_here(
    tables: list[pa.Table], write: Callable[[pa.Table], _T], output: RunOutput, on_event: OnEvent
) -> list[_T] | RunError | None:
    """As `_write_here`; None on a node that does not see the output either. Errors are values,
    since Ray wraps what a task raises."""
    if not output.is_here():
        return None
    try:
        return _write_here(tables, write, output, on_event)
    except RunError as error:
        return error


def _write_here(
    tables: list[pa.Table], write: Callable[[pa.Table], _T], output: RunOutput, on_event: OnEvent
) -> list[_T]:
    with hear_outages(on_event):
        output.check_run()
        return [write(table) for table in tables]
