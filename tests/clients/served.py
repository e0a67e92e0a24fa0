"""Serves a model for the tests of this folder: `python -m tests.clients.served MODEL`.

The application is the endpoint's own, in front of one replica in this process, without Ray. Prints
the port, and ends with its standard input. MODEL may be `bytes`: random weights, with a tokenizer
that can spell any JSON.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from cluster.logs import configure_logs
from cluster.protocol import LabelRequest, Priority
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.http.app import ApiSettings, create_app
from cluster.serving.replica import VLMReplica
from sppruner.engine.interface import Result
from sppruner.spec import Budget, PruneSpec


class LocalReplicas:
    """`StreamingReplicas` of one replica in this process."""

    def __init__(self, replica: VLMReplica) -> None:
        self._replica = replica

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        return await self._replica.label(requests, priority=priority)

    async def stream(self, request: LabelRequest) -> AsyncGenerator[str | Result]:
        async for piece in self._replica.stream(request):
            yield piece

    async def stats(self) -> object:
        return await self._replica.stats()


def main() -> None:
    """Serves until standard input ends."""
    configure_logs()  # to stderr: the other end of stdout is read once
    with tempfile.TemporaryDirectory() as folder:
        model = sys.argv[1]
        if model == "bytes":
            from tests.sppruner.families.folders import write_folder

            model = str(write_folder("llava", Path(folder), by_bytes=True))
        asyncio.run(_serve(model))


async def _serve(model: str) -> None:
    replica = VLMReplica(EngineSettings(model=model))
    spec = PruneSpec(method="sppruner", budget=Budget(ratio=0.5))
    app: Any = create_app(
        LocalReplicas(replica), ApiSettings(default_spec=spec, default_tokens=64), model="served"
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))

    def watch() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    await server.serve(sockets=[listener])
    replica.close()


if __name__ == "__main__":
    main()
