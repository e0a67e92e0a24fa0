"""Builds a shape's model from its config with random weights; nothing is downloaded.

Tokenizer and chat template are those of the embedded models; image preprocessing is that of the
published models.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import AutoModelForImageTextToText, LlavaConfig, Qwen2_5_VLConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cluster.errors import UsageError
from jobs.suites.shapes import ModelShape, ModelWidths
from sppruner.models.loading import (
    EMBEDDED,
    LoadedModel,
    ModelIdentity,
    dtype_on,
    image_backend,
    load_model,
    load_processor,
)
from sppruner.tiny.model import build_processor
from sppruner.tiny.qwen import IMAGE_PAD, VISION_END, VISION_START, build_qwen_tokenizer

_CONTEXT: Final = 4096
_PATCH: Final = 14  # pixels per patch side, in both towers
_MERGE: Final = 2  # Qwen: patches per token along each axis


def build(shape: ModelShape, dtype: str = "auto") -> LoadedModel:
    """Builds the model on a GPU if there is one, else on the CPU; dtype as for `load_model`. It has
    no end token, so every answer has `max_new_tokens` tokens. Raises UsageError for a shape that
    needs a GPU where there is none."""
    if shape.needs_gpu and not torch.cuda.is_available():
        raise UsageError(f"--shape {shape.name} needs a CUDA device: use one of its smaller shapes")
    if shape.widths is None:
        loaded = load_model(EMBEDDED, dtype=dtype)
    else:
        loaded = _build_random(shape, shape.widths, dtype)
    # Without an end token every answer has exactly max_new_tokens tokens.
    loaded.model.generation_config.eos_token_id = None
    return loaded


def save(shape: ModelShape, folder: Path, dtype: str = "auto") -> None:
    """Writes the model of `build` as a folder for `load_model`, still without an end token. Raises
    as `build` does."""
    loaded = build(shape, dtype)
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # as `load_model` does
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)


def build_config_and_processor(shape: ModelShape, widths: ModelWidths) -> tuple[Any, Any]:
    """Config and processor of a random model of these widths."""
    return _build_llava(shape, widths) if widths.family == "llava" else _build_qwen(shape, widths)


def _build_random(shape: ModelShape, widths: ModelWidths, dtype: str) -> LoadedModel:
    config, processor = build_config_and_processor(shape, widths)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_dtype = getattr(torch, dtype_on(device, dtype))
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch_dtype)
    return LoadedModel(
        identity=ModelIdentity(name=f"random {shape.name}", path="", revision="random"),
        model=model.eval(),
        processor=processor,
        image_backend=image_backend(processor),
    )


def _decoder_config(widths: ModelWidths, tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": max(widths.vocabulary, len(tokenizer)),
        "hidden_size": widths.hidden,
        "intermediate_size": widths.intermediate,
        "num_hidden_layers": widths.layers,
        "num_attention_heads": widths.heads,
        "num_key_value_heads": widths.kv_heads,
        "max_position_embeddings": _CONTEXT,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _build_llava(shape: ModelShape, widths: ModelWidths) -> tuple[Any, Any]:
    square = {"height": shape.side, "width": shape.side}
    processor = build_processor()
    processor.image_processor = CLIPImageProcessorPil(size=square, crop_size=square)
    processor.patch_size = _PATCH
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": widths.tower_hidden,
        "intermediate_size": widths.tower_intermediate,
        "num_hidden_layers": widths.tower_layers,
        "num_attention_heads": widths.tower_heads,
        "image_size": shape.side,
        "patch_size": _PATCH,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama"} | _decoder_config(widths, processor.tokenizer),
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(shape.side // _PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return config, processor


def _build_qwen(shape: ModelShape, widths: ModelWidths) -> tuple[Any, Any]:
    tokenizer = build_qwen_tokenizer()
    head = widths.hidden // widths.heads
    vision = {
        "depth": widths.tower_layers,
        "hidden_size": widths.tower_hidden,
        "intermediate_size": widths.tower_intermediate,
        "num_heads": widths.tower_heads,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": 2,
        "window_size": 8 * _PATCH,
        "fullatt_block_indexes": list(
            range(widths.full_attention - 1, widths.tower_layers, widths.full_attention)
        ),
        "out_hidden_size": widths.hidden,
    }
    rotary = {
        "rope_type": "default",
        "rope_theta": 1_000_000.0,
        "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
    }
    convert = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=_decoder_config(widths, tokenizer) | {"rope_parameters": rotary},
        image_token_id=convert(IMAGE_PAD),
        video_token_id=convert("<|video_pad|>"),
        vision_start_token_id=convert(VISION_START),
        vision_end_token_id=convert(VISION_END),
    )
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": shape.side**2, "longest_edge": shape.side**2},
        patch_size=_PATCH,
        merge_size=_MERGE,
    )
    # `load_processor` builds the family's processor without video support only from a folder.
    with tempfile.TemporaryDirectory() as folder:
        for part in (config, tokenizer, images):
            part.save_pretrained(folder)
        processor = load_processor(ModelIdentity(name=shape.name, path=folder, revision="random"))
    return config, processor
