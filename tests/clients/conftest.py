"""A served model in another process, by the interpreter that SPPRUNER_PYTHON names. Where the
clients are not installed nothing is collected."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_CLIENTS = ("openai", "langchain_openai", "litellm", "instructor", "schemathesis")
collect_ignore_glob = [] if all(map(importlib.util.find_spec, _CLIENTS)) else ["test_*.py"]
_ROOT = Path(__file__).parents[2]


def _serve(model: str) -> Iterator[str]:
    python = os.environ.get("SPPRUNER_PYTHON", str(_ROOT / ".venv" / "bin" / "python"))
    process = subprocess.Popen(
        [python, "-m", "tests.clients.served", model],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.strip().isdecimal():
                yield f"http://127.0.0.1:{line.strip()}"
                break
        else:
            raise AssertionError("the server did not start; its error is above")
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Address of the embedded model, pruned to half of its visual tokens."""
    yield from _serve("tiny-llava")


@pytest.fixture(scope="session")
def byte_endpoint() -> Iterator[str]:
    """Address of a random model whose tokens spell any JSON."""
    yield from _serve("bytes")


@pytest.fixture(scope="session")
def image_uri() -> str:
    """A red square as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (96, 96), (200, 30, 30)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
