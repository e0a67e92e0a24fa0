"""`python -m vllm.entrypoints.openai.api_server`, asked by the official client: the plugin needs
nothing of this project's cluster."""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from sppruner.engine import open_engine
from sppruner.models.loading import resolve_model
from sppruner.spec import DENSE, PruneSpec
from tests.sppruner.integrations.vllm.requests import SPECS, questions

pytestmark = pytest.mark.timeout(600)


@contextmanager
def served(log: Path, *options: str) -> Iterator[openai.OpenAI]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", resolve_model("tiny-llava").path, "--served-model-name", "tiny",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
        "--generation-config", "vllm", "--port", str(port), *options,
    ]  # fmt: skip
    with log.open("wb") as file:
        server = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None, log.read_text(errors="replace")[-4000:]
                assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
                time.sleep(0.5)
        yield client
    finally:
        server.terminate()
        server.wait(timeout=60)


def ask(client: openai.OpenAI, request: Any, spec: PruneSpec | None) -> Any:
    extra: dict[str, Any] = {}
    if spec is not None:
        kwargs = {"prune": spec.to_dict(), "prune_instruction": request.prompt}
        extra = {"extra_body": {"mm_processor_kwargs": kwargs}}
    (image,) = request.images
    return client.chat.completions.create(
        model="tiny",
        temperature=0,
        max_tokens=request.generation.max_new_tokens,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url(image)}},
                    {"type": "text", "text": request.prompt},
                ],
            }
        ],
        **extra,
    )


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_budgets_by_request_are_those_of_the_engine(tmp_path: Path) -> None:
    requests = questions(16)
    specs = [SPECS[number % len(SPECS)] for number in range(len(requests))]
    engine = open_engine("tiny-llava", dtype="float32")
    from dataclasses import replace

    expected = engine.run(
        [replace(request, spec=spec) for request, spec in zip(requests, specs, strict=True)]
    )
    with served(tmp_path / "log", "--trust-request-mm-kwargs") as client:
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(lambda pair: ask(client, *pair), zip(requests, specs, strict=True))
            )
        for answer, result in zip(answers, expected, strict=True):
            assert answer.choices[0].message.content.strip() == result.text
            assert answer.usage.prompt_tokens == result.prompt_tokens
        with pytest.raises(openai.BadRequestError, match="no pruning method 'nonesuch'"):
            ask(client, requests[0], PruneSpec(method="nonesuch"))
        with pytest.raises(openai.BadRequestError, match="inside the decoder"):
            ask(client, requests[0], PruneSpec(method="fastv", budget=SPECS[1].budget))


@pytest.mark.slow
def test_a_server_has_a_default_and_trusts_no_client_unasked(tmp_path: Path) -> None:
    request = questions(1)[0]
    engine = open_engine("tiny-llava", dtype="float32")
    from dataclasses import replace

    pruned, dense = engine.run([replace(request, spec=SPECS[1]), replace(request, spec=DENSE)])
    default = '{"prune": ' + SPECS[1].to_json() + "}"
    with served(tmp_path / "log", "--mm-processor-kwargs", default) as client:
        answer = ask(client, request, None)
        assert answer.usage.prompt_tokens == pruned.prompt_tokens < dense.prompt_tokens
        with pytest.raises(openai.BadRequestError):
            ask(client, request, DENSE)
