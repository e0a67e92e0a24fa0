"""vLLM on the CPU, in its own environment: `make test-vllm`. Where it is not installed, only what
needs none of it is collected."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_WITHOUT_VLLM = {"test_wire.py"}

collect_ignore = (
    []
    if importlib.util.find_spec("vllm")
    else [
        path.name
        for path in Path(__file__).parent.glob("test_*.py")
        if path.name not in _WITHOUT_VLLM
    ]
)

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

OPTIONS: dict[str, Any] = {"enforce_eager": True, "max_model_len": 1024}
"""Of every engine under test, unless a test says otherwise."""


class _OneEngine:
    """Opens engines, one at a time: each plans with all of the memory."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._opened: tuple[str, str] | None = None

    def open(self, model: str, **options: Any) -> Any:
        from sppruner.integrations.vllm.engine import VllmEngine

        wanted = model, repr(sorted(options.items()))
        if self._opened != wanted:
            self.close()
            chosen: dict[str, Any] = {"slots": 8, "dtype": "float32"} | OPTIONS | options
            self._engine = VllmEngine(model, **chosen)
            self._opened = wanted
        self._engine.clear_caches()
        return self._engine

    def close(self) -> None:
        if self._engine is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._engine.close()
        self._engine = self._opened = None
        gc.collect()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def one_engine() -> Iterator[_OneEngine]:
    opener = _OneEngine()
    yield opener
    opener.close()


@pytest.fixture
def open_vllm(one_engine: _OneEngine) -> Callable[..., Any]:
    """Opens an engine around vLLM; the same one again where it is asked for the same."""
    return one_engine.open
