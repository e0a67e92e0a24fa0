"""Options of vLLM that `VllmEngine` does not hand on. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sppruner.errors import SpecError

# What would make a promise of the interface untrue, and why.
_REFUSED: Final[Mapping[str, str]] = {
    "async_scheduling": "steps would overlap, and a row's seconds be unknown",
    "pipeline_parallel_size": "later stages do not see where kept tokens stand",
    "data_parallel_size": "a replica is one engine: start more replicas",
    "speculative_config": "a row's tokens are not counted one by one",
    "mm_encoder_tp_mode": "ranks would deal images out inside the tower",
    "worker_extension_cls": "the engine has one of its own, which proves what was pruned",
    "generation_config": "sampling is the request's",
    "scheduling_policy": "urgent requests must overtake",
    "mm_processor_cache_gb": "a cancelled request would make the next one fail",
}


def check_options(options: Mapping[str, Any]) -> None:
    """Raises SpecError for an option whose effect the engine cannot answer for."""
    for name in options:
        if name in _REFUSED:
            raise SpecError(f"option {name} of vLLM is the engine's own: {_REFUSED[name]}")
