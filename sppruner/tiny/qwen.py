"""Builds the embedded Qwen2.5-VL, on the vocabulary of the embedded LLaVA.

A vision tower with window attention, merged patches and rotary positions only, any image size, no
class token; a language model with M-RoPE. Patches of 4 px are merged 2 x 2, so that a square image
becomes 12 x 12 visual tokens as in the LLaVA. Larger images are resized to about the same number of
tokens, with their aspect ratio preserved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sppruner.tiny.model import CHAT_TEMPLATE, IMAGE_SIDE, PATCH_SIDE, build_tokenizer

__all__ = [
    "IMAGE_PAD",
    "MERGE",
    "VISION_END",
    "VISION_START",
    "build_qwen_config",
    "build_qwen_images",
    "build_qwen_model",
    "build_qwen_tokenizer",
    "save_qwen",
]

MERGE: Final = 2
_HIDDEN: Final = 128
_WINDOW: Final = 32  # pixels; 4 x 4 merged tokens

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, _VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


def build_qwen_tokenizer() -> PreTrainedTokenizerFast:
    """The LLaVA's tokenizer with Qwen's four vision tokens appended; all other ids are equal."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([VISION_START, VISION_END, IMAGE_PAD, _VIDEO_PAD], special_tokens=True)
    image = f"{VISION_START}{IMAGE_PAD}{VISION_END}"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<image>", image)
    return tokenizer


def build_qwen_images() -> Qwen2VLImageProcessorPil:
    """An image processor without torchvision; at most 144 visual tokens per image."""
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": (IMAGE_SIDE // 2) ** 2, "longest_edge": IMAGE_SIDE**2},
        patch_size=PATCH_SIDE // MERGE,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def build_qwen_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Vision 128 x 4, window attention in blocks 0 and 2; language model 128 x 4, tied."""
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "depth": 4,
        "hidden_size": _HIDDEN,
        "intermediate_size": 3 * _HIDDEN,
        "num_heads": 4,
        "patch_size": PATCH_SIDE // MERGE,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": _WINDOW,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": _HIDDEN,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": _HIDDEN,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        # Half of a head's 32 channels are frequencies: time 4, height 6, width 6. Words are matched
        # on the slower half (`jobs.training.language`), which must hardly rotate within a prompt.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [4, 6, 6],
        },
        "tie_word_embeddings": True,
        **ids,
    }
    convert = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=convert(IMAGE_PAD),
        video_token_id=convert(_VIDEO_PAD),
        vision_start_token_id=convert(VISION_START),
        vision_end_token_id=convert(VISION_END),
        tie_word_embeddings=True,
        **ids,
    )


def build_qwen_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """The model in float32 with transformers' default random weights."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = Qwen2_5_VLForConditionalGeneration(build_qwen_config(tokenizer))
    finally:
        torch.random.set_rng_state(state)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=48,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def save_qwen(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Writes a `from_pretrained` folder with bfloat16 weights; converts the model to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    # transformers makes the file readable by its owner only; services use other accounts.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    build_qwen_images().save_pretrained(folder)
