"""Options of vLLM that `VllmEngine` does not hand on, and those of its own. Imports no vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
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
    "enable_tower_connector_lora": "an image's hash would not tell its adapter",
    "structured_outputs_config": "formats are followed as this project's own engine does",
}
# Ranks that vLLM has kernels for.
_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises SpecError for an option whose effect the engine cannot answer for."""
    for name in options:
        if name in _REFUSED:
            raise SpecError(f"option {name} of vLLM is the engine's own: {_REFUSED[name]}")


def lora_options(folder: str) -> dict[str, Any]:
    """Options with which vLLM can apply an adapter (PEFT's format). Raises SpecError for a folder
    that holds none."""
    try:
        rank = int(json.loads((Path(folder) / "adapter_config.json").read_text())["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(
            f"lora {folder}: no adapter of PEFT's format is there ({type(error).__name__}: {error})"
        ) from error
    room = next((most for most in _RANKS if most >= rank), None)
    if room is None:
        raise SpecError(f"lora {folder}: rank {rank}, and vLLM has kernels up to {_RANKS[-1]}")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
