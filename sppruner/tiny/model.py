"""Builds the embedded LLaVA: tokenizer, chat template, processor, configuration and model.

A CLIP vision tower and a Llama language model in `LlavaForConditionalGeneration`, about 2 M
parameters, loadable by `from_pretrained` like any LLaVA checkpoint. The vocabulary is hand-written,
so building it needs no data; any ASCII text tokenizes without an unknown token.

`python -m sppruner.tiny.model DIR` writes a loadable folder with random weights.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sppruner.tiny.layout import BACKGROUNDS, COLORS, GRID, SHAPES, SIZES, TEXTURES
from sppruner.tiny.questions import COLUMNS, NUMBERS, ROWS, plural

__all__ = [
    "CHAT_TEMPLATE",
    "IMAGE_SIDE",
    "PATCH_SIDE",
    "PLURALS",
    "SPECIAL_TOKENS",
    "VISUAL_TOKENS",
    "WORDS",
    "build_config",
    "build_model",
    "build_processor",
    "build_tokenizer",
    "save",
]

PATCH_SIDE: Final = 8
IMAGE_SIDE: Final = GRID * PATCH_SIDE  # 96
VISUAL_TOKENS: Final = GRID**2  # 144, a quarter of LLaVA-1.5's 576
_HIDDEN: Final = 128

SPECIAL_TOKENS: Final = ("<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<image>")
PLURALS: Final = {plural(shape): shape for shape in SHAPES}
DIGITS: Final = tuple(string.digits)

WORDS: Final = (
    *COLORS,
    *SHAPES,
    *SIZES,
    "sign",
    *DIGITS,
    *BACKGROUNDS,
    *TEXTURES,
    *ROWS,
    *COLUMNS,
)
"""The words that can describe an image patch; each has its own direction of the token space."""

_OTHER_WORDS: Final = (
    *PLURALS,
    *NUMBERS,
    *"above below yes no what is the where there a how many are size shape color colour".split(),
    *"object objects relative to number on background describe image with reading".split(),
    *"of and in picture an do you see which it this that has nearest behind".split(),
)

# Image first, as in training; a system message and text-only turns are accepted.
CHAT_TEMPLATE: Final = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<assistant>' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '<user>' -}}
    {%- endif -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] in ('image', 'image_url') -%}
            {{- '<image>' -}}
        {%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<assistant>' -}}
{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer with the hand-written vocabulary."""
    letters = string.ascii_lowercase + string.digits
    entries = [
        *SPECIAL_TOKENS,
        *WORDS,
        *_OTHER_WORDS,
        *letters,
        *string.punctuation,
        *(f"##{letter}" for letter in letters),
    ]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=4096))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<image>"],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast | None = None) -> LlavaProcessor:
    """A processor without torchvision that expands one `<image>` to exactly `VISUAL_TOKENS` ids."""
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    images = CLIPImageProcessorPil(
        size=side,
        crop_size=side,
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer or build_tokenizer(),
        patch_size=PATCH_SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """ViT 128 x 6 on 96 px, features of the last layer; Llama 128 x 4 with tied embeddings."""
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=_HIDDEN,
        intermediate_size=4 * _HIDDEN,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIDE,
        projection_dim=_HIDDEN,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_HIDDEN,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        **ids,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=VISUAL_TOKENS,
        # The last layer, whose class token the training recipe trains to attend to the objects.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **ids,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """The model in float32 with transformers' default random weights."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = LlavaForConditionalGeneration(build_config(tokenizer))
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


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Writes a `from_pretrained` folder with bfloat16 weights; converts the model to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    # transformers makes the file readable by its owner only; services use other accounts.
    (folder / "model.safetensors").chmod(0o644)
    processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the model folder with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    processor = build_processor()
    save(build_model(processor.tokenizer, arguments.seed), processor, arguments.folder)


if __name__ == "__main__":
    main()
