"""Writes of whole units in Ray's write tasks: on this node, or where the output is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import pyarrow as pa
import ray
import structlog
from ray.data.block import Block, BlockAccessor

from cluster.corpus.packed import unpack_units
from cluster.events import OnEvent, RunEvent
from cluster.other_node import another_node
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
    on this node another one writes, and waits if need be. Raises what `write` raises."""
    tables = [
        table
        for block in blocks
        for table in unpack_units(BlockAccessor.for_block(block).to_arrow())
    ]
    elsewhere = None if output.is_here() else another_node()
    if elsewhere is None:
        return _write_here(tables, write, on_event)
    logger.warning("store_not_on_this_node", uri=output.uri)
    on_event(RunEvent.UNIT_MOVED, len(tables))
    remote = ray.remote(_write_here).options(num_cpus=0, scheduling_strategy=elsewhere)
    written: list[_T] = ray.get(remote.remote(tables, write, on_event))
    return written


def _write_here(
    tables: list[pa.Table], write: Callable[[pa.Table], _T], on_event: OnEvent
) -> list[_T]:
    with hear_outages(lambda seconds: on_event(RunEvent.STORE_WAITED, round(seconds))):
        return [write(table) for table in tables]
