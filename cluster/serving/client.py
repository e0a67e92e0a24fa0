"""The client of replicas behind a Ray Serve handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from cluster.errors import Busy
from cluster.protocol import BlockAnswers, LabelRequest, Priority
from sppruner.engine.interface import Result

REPLICA_GONE: Final = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    ReplicaUnavailableError,
)
"""What a call raises whose replica died."""
REPLICA_FULL: Final = (Busy, BackPressureError, DeploymentUnavailableError)
"""What a call raises that was refused for now, as while a fleet is deployed again."""


class ServeReplicas:
    """`Replicas` behind a Serve handle. A cancelled caller cancels its call at the replica."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        """See `Replicas.label`."""
        response = self._handle.label.remote(list(requests), priority=priority)
        try:
            results: list[Result] = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        return results

    async def label_alone(
        self, requests: Sequence[LabelRequest]
    ) -> AsyncGenerator[list[Result] | None]:
        """See `BatchReplicas.label_alone`."""
        response = self._streaming.label_alone.remote(list(requests))
        try:
            async for answer in response:
                yield answer
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise

    async def label_block(
        self, requests: Sequence[LabelRequest], *, dense_first: bool
    ) -> BlockAnswers:
        """See `BatchReplicas.label_block`."""
        response = self._handle.label_block.remote(list(requests), dense_first=dense_first)
        try:
            answers: BlockAnswers = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        return answers

    async def stats(self) -> object:
        """See `StreamingReplicas.stats`."""
        return await self._handle.stats.remote()

    async def stream(self, request: LabelRequest) -> AsyncGenerator[str | Result]:
        """See `Replicas.stream`."""
        response = self._streaming.stream.remote(request)
        try:
            async for piece in response:
                yield piece
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise
