"""Options of vLLM that `VllmEngine` does not hand on, and those of its own. Imports no vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

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
    "model": "it is named apart, --model",
    "dtype": "it is named apart, --dtype",
    "max_num_seqs": "these are the replica's slots",
    "disable_log_stats": "rows have what it would log",
    "tokenizer": "texts are counted with the model's own",
    "tokenizer_mode": "texts are counted with the model's own",
    "skip_tokenizer_init": "answers are texts",
    "reasoning_parser": "formats would not hold from the first token",
    "structured_outputs_config": "formats are followed as this project's own engine does",
}
# In names of weights of vision towers and projectors.
_OUTSIDE: Final = ("vision", "visual", "projector", "connector", "merger", "mlp1")
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
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        rank = max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)
        with safe_open(Path(folder) / "adapter_model.safetensors", "np") as weights:
            names = list(weights.keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise SpecError(
            f"lora {folder}: no adapter of PEFT's format is there ({type(error).__name__}: {error})"
        ) from error
    outside = [name for name in names if any(part in name for part in _OUTSIDE)]
    if outside:
        raise SpecError(
            f"lora {folder}: {outside[0]} adapts what is not the decoder, which vLLM would leave "
            "out without a word"
        )
    room = next((most for most in _RANKS if most >= rank), None)
    if room is None:
        raise SpecError(f"lora {folder}: rank {rank}, and vLLM has kernels up to {_RANKS[-1]}")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
