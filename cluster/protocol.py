"""What travels between a client (batch stage or HTTP edge) and a replica, and the sizes both use.

Images travel compressed: a 1-megapixel JPEG is about 0.2 MB, its patches as floats 24 MB. A call
returns one result per request, in order; a bad row gives a result with `error_code` set, never an
exception. Only `Busy` and a dead replica are exceptions.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Protocol

from cluster.config import MediaLimits
from cluster.errors import RowError
from sppruner.conversation import Turn
from sppruner.engine.interface import Result, SamplingParams
from sppruner.spec import DENSE, PruneSpec

VERSION: Final = 7
"""Raised with every change of what travels here. Replicas of one version are never found by
clients of another, which could not read their answers."""

# Rows of one call, where a replica has as many slots at least.
_CALL_ROWS: Final = 16
# Calls queued at each replica beside those in its slots: one is decoded and waits, one is being
# decoded.
_CALLS_QUEUED: Final = 2


class Priority(IntEnum):
    """Lower is served first."""

    ONLINE = 0
    BATCH = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRequest:
    """One row to label."""

    id: str
    """Unique within its call; the result carries it."""
    prompt: str
    """The user's text."""
    images: tuple[bytes | None, ...] = ()
    """Compressed images in prompt order; None is a missing one, which gives `image_missing`."""
    system: str | None = None
    """The system prompt, or None."""
    turns: tuple[Turn, ...] = ()
    """See `Request.turns`."""
    spec: PruneSpec = DENSE
    """The pruning of this request alone."""
    generation: SamplingParams = field(default_factory=SamplingParams)
    """How its tokens are sampled."""
    logprobs: int | None = None
    """See `Request.logprobs`."""
    fit_context: bool = False
    """See `Request.fit_context`."""
    media: MediaLimits = field(default_factory=MediaLimits)
    """Limits of its images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockAnswers:
    """What became of a control block: rows that one replica answered both ways."""

    pruned: list[Result]
    """The rows' answers under their own spec, in order."""
    dense: list[Result] | None
    """Their dense twins; None where the block was spoiled, so that no seconds can be compared."""
    pruned_steady: Mapping[str, float] = field(default_factory=dict)
    """`steady_seconds` of the pruned answers, by row, among rows answered both ways."""
    dense_steady: Mapping[str, float] = field(default_factory=dict)
    """The same of their dense twins."""
    discarded_seconds: float = 0.0
    """Replica time of warm-ups, and of the dense twins of a spoiled block."""


class Replicas(Protocol):
    """Anything that labels rows: replicas behind a Serve handle, or a double in a test."""

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        """One result per request, in order.

        Raises Busy, or Ray's actor errors if the replica died.
        """
        ...


class BatchReplicas(Replicas, Protocol):
    """Replicas that also run a call alone, and measure."""

    def label_alone(self, requests: Sequence[LabelRequest]) -> AsyncGenerator[list[Result] | None]:
        """None once nothing else runs on the replica that took the call, then what `label` returns.
        Raises as `label` does."""
        ...

    async def label_block(
        self, requests: Sequence[LabelRequest], *, dense_first: bool
    ) -> BlockAnswers:
        """The rows answered under their specs and densely, one way after the other, with empty
        caches at the start of each. Raises as `label` does."""
        ...


class StreamingReplicas(Replicas, Protocol):
    """Replicas that also stream answers, and say how they are."""

    async def stats(self) -> object:
        """Counters of one replica. Raises as `label` does."""
        ...

    def stream(self, request: LabelRequest) -> AsyncGenerator[str | Result]:
        """The text of an online request piece by piece, then its result. Raises as `label` does."""
        ...


def row_error_result(id: str, error: RowError) -> Result:
    """The result of a request that failed outside the engine."""
    return Result(
        id=id,
        text=None,
        error_code=error.code,
        error_message=str(error),
        error_stage=error.stage,
    )


def call_rows(slots: int) -> int:
    """Rows of one call to replicas of `slots` slots."""
    return min(_CALL_ROWS, slots)


def rows_waiting(slots: int) -> int:
    """Batch rows that a labeller keeps waiting at each replica beside those in its slots."""
    return _CALLS_QUEUED * call_rows(slots)


def rows_held(slots: int) -> int:
    """Batch rows that a replica accepts before it answers Busy: its queue and twice its slots,
    since Serve spreads calls evenly only on average."""
    return 2 * slots + rows_waiting(slots)
