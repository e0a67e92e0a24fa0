"""Tiny random model folders of every family with the Hub's layout: weights, configs, a tokenizer
with the family's special tokens, the processor's settings and a chat template."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from tests.sppruner.families import FAMILIES, llava_next, llava_onevision, qwen2_vl
from tests.sppruner.families import idefics3 as idefics
from tests.sppruner.families import internvl as intern
from tests.sppruner.families.base import BOS, EOS, PAD
from tests.sppruner.families.llava import SIDE

_VOCABULARY = 64  # of every model under test


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderParts:
    """The parts of a folder that differ between families."""

    special: Mapping[str, int]
    """Special tokens and their ids."""
    image: str
    """The chat template's text for an image."""
    images: Mapping[str, Any]
    """Settings of the image processor (preprocessor_config.json)."""
    processor: Mapping[str, Any]
    """Settings of the processor (processor_config.json)."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the processor reads from the tokenizer by attribute name."""


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


_QWEN = FolderParts(
    special={
        "<|image_pad|>": qwen2_vl.IMAGE,
        "<|video_pad|>": qwen2_vl.VIDEO,
        "<|vision_start|>": qwen2_vl.START,
        "<|vision_end|>": qwen2_vl.END,
    },
    image="<|vision_start|><|image_pad|><|vision_end|>",
    images={
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": qwen2_vl.PATCH,
        "temporal_patch_size": qwen2_vl.FRAMES,
        "merge_size": qwen2_vl.MERGE,
        "size": {"shortest_edge": 8 * 8, "longest_edge": 64 * 64},
    },
    processor={},
)


def _idefics3(prefix: str) -> FolderParts:
    return FolderParts(
        special={
            "<image>": idefics.IMAGE,
            "<fake_token_around_image>": idefics.FRAME,
            "<global-img>": idefics.GLOBAL,
            "<end_of_utterance>": 11,
        },
        image="<image>",
        images={
            "image_processor_type": f"{prefix}ImageProcessor",
            "size": {"longest_edge": 2 * idefics.TILE},
            "max_image_size": {"longest_edge": idefics.TILE},
        },
        processor={"image_seq_len": idefics.TOKENS},
    )


PARTS: dict[str, FolderParts] = {
    "llava": FolderParts(
        special={"<image>": 5},
        image="<image>\n",
        images={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 4 * SIDE},
            "crop_size": _square(4 * SIDE),
        },
        processor={
            "patch_size": 4,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    ),
    "llava_next": FolderParts(
        special={"<image>": llava_next.IMAGE},
        image="<image>\n",
        images={
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": llava_next.TILE},
            "crop_size": _square(llava_next.TILE),
            "image_grid_pinpoints": llava_next.PINPOINTS,
        },
        processor={
            "patch_size": llava_next.TILE // llava_next.SIDE,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    ),
    "llava_onevision": FolderParts(
        special={"<image>": llava_onevision.IMAGE, "<video>": llava_onevision.VIDEO},
        image="<image>\n",
        images={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": _square(llava_onevision.TILE),
            "image_grid_pinpoints": llava_onevision.PINPOINTS,
        },
        processor={
            "num_image_tokens": llava_onevision.SIDE**2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_2",
        },
    ),
    "internvl": FolderParts(
        special={
            "<IMG_CONTEXT>": intern.IMAGE,
            "<img>": intern.START,
            "</img>": intern.END,
            "<video>": 8,
        },
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        image="<IMG_CONTEXT>\n",
        images={
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": _square(intern.TILE),
            "crop_to_patches": True,
            "max_patches": 3,
        },
        processor={"image_seq_length": intern.TOKENS},
    ),
    "idefics3": _idefics3("Idefics3"),
    "smolvlm": _idefics3("SmolVLM"),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
}
# Class names as in the configs on the Hub.
_PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "internvl": "InternVLProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}


def tokenizer_of(parts: FolderParts, *, by_bytes: bool = False) -> PreTrainedTokenizerFast:
    """One token per character, and the special tokens at the model's ids. by_bytes: as tokenizers
    that spell bytes have it, with the characters of JSON; others than these are left out."""
    fixed = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": 3, **parts.special}
    free = [number for number in range(_VOCABULARY) if number not in fixed.values()]
    if by_bytes:  # "Ġ" spells a space
        characters = f"{string.ascii_lowercase}{string.digits}Ġ" + '"{}[]:,.-'
        vocabulary = fixed | dict(zip(characters, free, strict=False))
        backend = Tokenizer(BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        characters = f"{string.ascii_lowercase}{string.digits} \n.,?!:-"
        vocabulary = fixed | dict(zip(characters, free, strict=False))
        backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=dict(parts.named) or list(parts.special),
        model_input_names=["input_ids", "attention_mask"],
        # Loading sets left padding, whatever a folder's setting is.
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def chat_template(image: str) -> str:
    return (
        "<s>{%- for message in messages -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{ " + repr(image) + " }}"
        "{%- else -%}{{ part['text'] }}{%- endif -%}"
        "{%- endfor -%}{{ '\\n' }}{%- endfor -%}"
    )


def write_folder(family: str, folder: Path, *, by_bytes: bool = False) -> Path:
    """A loadable folder of a random tiny model of `family`. by_bytes: see `tokenizer_of`."""
    parts = PARTS[family]
    FAMILIES[family].build().save_pretrained(folder)
    tokenizer_of(parts, by_bytes=by_bytes).save_pretrained(folder)
    name = _PROCESSORS[family]
    settings = {"processor_class": name, **parts.processor}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    images = {"processor_class": name, **parts.images}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "chat_template.jinja").write_text(chat_template(parts.image))
    return folder
