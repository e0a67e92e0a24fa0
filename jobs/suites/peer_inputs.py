"""What processes with vLLM read: the model, images and prompts of suites `engine` and `peers`."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import transformers
from safetensors.torch import load_file, save_file

from sppruner.cost.decoder_cost import DecoderCost
from sppruner.engine import Request
from sppruner.models.loading import LoadedModel
from sppruner.prompts import build_inputs

_BLOCK: Final = 128  # tokens per block of vLLM's KV cache on a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInputs:
    """Inputs in a folder, which holds the model too."""

    folder: Path
    settings: dict[str, Any]
    """Arguments of vLLM's `LLM`, without the model."""
    prompts: list[list[int]]
    """Unpruned prompt token ids of each request, as our engines build them."""
    new_tokens: int
    """Tokens of every answer."""

    @property
    def model(self) -> Path:
        """The model's folder, which our engines can load too."""
        return self.folder / "model"


@contextmanager
def written_inputs(
    loaded: LoadedModel, requests: Sequence[Request], *, slots: int
) -> Iterator[PeerInputs]:
    """The inputs, in a folder that goes with the context. slots: most requests side by side."""
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        folder = Path(name)
        _write_model(folder / "model", loaded)
        prompts, prepared = [], []
        for number, request in enumerate(requests):
            (image,) = request.images
            inputs = build_inputs(loaded.processor, [request.prompt], [image])
            prompts.append(inputs["input_ids"][0].tolist())
            image.save(folder / f"{number}.png")
            content = [{"type": "image"}, {"type": "text", "text": request.prompt}]
            prompt = loaded.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            prepared.append({"prompt": prompt, "asked": request.prompt, "image": f"{number}.png"})
        new_tokens = requests[0].generation.max_new_tokens
        settings = _vllm_settings(loaded, max(map(len, prompts)) + new_tokens, slots)
        written = {"settings": settings, "new_tokens": new_tokens, "requests": prepared}
        (folder / "requests.json").write_text(json.dumps(written))
        yield PeerInputs(folder=folder, settings=settings, prompts=prompts, new_tokens=new_tokens)


def _write_model(folder: Path, loaded: LoadedModel) -> None:
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # as `load_model` does
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    # vLLM builds a family's video processor from this separate file.
    loaded.processor.image_processor.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        _rename_tower_weights(weights)


def _vllm_settings(loaded: LoadedModel, longest: int, slots: int) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`. longest: tokens of the longest prompt and its answer."""
    config, dtype = loaded.model.config, loaded.model.dtype
    context = -(-longest // _BLOCK) * _BLOCK
    decoder = DecoderCost.from_config(config.get_text_config(), bytes_per_value=dtype.itemsize)
    more = {}
    if loaded.model.device.type == "cuda":
        # Of no effect beside kv_cache_memory_bytes, but that so much memory must be free: others of
        # the suite hold the model too.
        more["gpu_memory_utilization"] = 0.1
    return more | {
        "dtype": str(dtype).removeprefix("torch."),
        # On a CPU, compiled it took the same CPU time on a pass of `llava` and started 40 s later.
        "enforce_eager": loaded.model.device.type == "cpu",
        "max_model_len": context,
        "max_num_seqs": slots,
        # One slot more: vLLM reserves a block.
        "kv_cache_memory_bytes": decoder.kv_bytes([context] * decoder.layers, 1) * (slots + 1),
        # With both off, every image gets a new id, so no vision features are reused.
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "generation_config": "vllm",
        "seed": 0,
    }


def _rename_tower_weights(weights: Path) -> None:
    """Renames a CLIP tower's weights: transformers 5 saves shorter names than released checkpoints
    have, and vLLM knows only those of the released ones."""
    short, long = "vision_tower.", "vision_tower.vision_model."
    tensors = load_file(weights)
    named = {
        name.replace(short, long, 1)
        if name.startswith(short) and not name.startswith(long)
        else name: tensor
        for name, tensor in tensors.items()
    }
    if named.keys() != tensors.keys():
        save_file(named, weights, metadata={"format": "pt"})
