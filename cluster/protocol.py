"""What travels between a caller (batch stage or HTTP edge) and a replica.

Images travel compressed: a 1-megapixel JPEG is about 0.2 MB, its patches as floats 24 MB. Every
call gets one answer per row, in order; a bad row gives an answer with `error_code` set, never an
exception. Only `Busy` and a dead replica are exceptions.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

from ray.serve.handle import DeploymentHandle

from cluster.config import MediaLimits
from cluster.errors import InferenceFailed, RowError
from sppruner.engine.interface import Result, SamplingParams
from sppruner.spec import DENSE, PruneSpec


class Priority(IntEnum):
    """Lower is served first."""

    ONLINE = 0
    BATCH = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRequest:
    """One row to label: prompt, compressed images, and its own pruning and generation settings.

    An image of None is a row whose image is missing: it is answered with `image_missing`.
    """

    id: str
    prompt: str
    images: tuple[bytes | None, ...] = ()
    system: str | None = None
    spec: PruneSpec = DENSE
    generation: SamplingParams = field(default_factory=SamplingParams)
    control: bool = False
    media: MediaLimits = field(default_factory=MediaLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAnswer:
    """An engine's Result as plain values, with the stage of its error. cost: modelled, as JSON."""

    id: str
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    visual_tokens: int = 0
    visual_tokens_kept: int = 0
    kept_tokens: bytes = b""
    seconds: float = 0.0
    control_text: str | None = None
    control_seconds: float | None = None
    cost: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    error_stage: str | None = None

    @classmethod
    def from_result(cls, result: Result) -> RowAnswer:
        return cls(
            id=result.id,
            text=result.text,
            finish_reason=result.finish_reason,
            prompt_tokens=result.prompt_tokens,
            completion_tokens=result.completion_tokens,
            visual_tokens=result.visual_tokens,
            visual_tokens_kept=result.visual_tokens_kept,
            kept_tokens=result.kept_tokens,
            seconds=result.seconds,
            control_text=result.control_text,
            control_seconds=result.control_seconds,
            cost=None if result.cost is None else json.dumps(result.cost.to_dict()),
            error_code=result.error_code,
            error_message=result.error_message,
            error_stage=None if result.error_code is None else stage_of(result.error_code),
        )

    @classmethod
    def from_error(cls, id: str, error: RowError) -> RowAnswer:
        return cls(id=id, error_code=error.code, error_message=str(error), error_stage=error.stage)


class Replicas(Protocol):
    """Anything that labels rows: a fleet behind a Serve handle, or a double in a test."""

    async def label(self, calls: Sequence[LabelRequest], *, priority: Priority) -> list[RowAnswer]:
        """One answer per call, in order. Raises Busy, or Ray's actor errors if the replica died."""
        ...

    def stream(self, call: LabelRequest) -> AsyncGenerator[str | RowAnswer]:
        """The answer to an online call as it is said, then the whole. Raises as `label` does."""
        ...


class ServeReplicas:
    """The replicas behind a Serve handle. A caller that goes away takes its call along."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def label(self, calls: Sequence[LabelRequest], *, priority: Priority) -> list[RowAnswer]:
        response = self._handle.label.remote(list(calls), priority=priority)
        try:
            answers: list[RowAnswer] = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        return answers

    async def stream(self, call: LabelRequest) -> AsyncGenerator[str | RowAnswer]:
        response = self._streaming.stream.remote(call)
        try:
            async for piece in response:
                yield piece
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise


def stage_of(code: str) -> str:
    """Where a row error of this code happens; engines name codes only."""
    return _STAGES.get(code, InferenceFailed.stage)


def _row_errors(cls: type[RowError]) -> Iterator[type[RowError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _row_errors(child)


_STAGES = {error.code: error.stage for error in _row_errors(RowError)}
