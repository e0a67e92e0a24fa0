"""Random tiny LLaVA models and left-padded batches, built from configs alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    set_seed,
)

IMAGE, PAD, BOS, EOS = 5, 0, 1, 2
SIDE = 4
TOKENS = SIDE * SIDE


def build(
    attention: str = "sdpa", *, feature_layer: int = -2, seed: int = 0
) -> LlavaForConditionalGeneration:
    """A random LLaVA in float32: 16 visual tokens an image, grouped-query attention. Weights are
    larger than the default initialisation, so that answers depend on what is seen."""
    set_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE * 4,
            patch_size=4,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        image_token_id=IMAGE,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        attn_implementation=attention,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0 if "language_model" in name else 4.0)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


def batch(images_per_row: Sequence[int], *, seed: int = 1) -> dict[str, Tensor]:
    """A left-padded batch of random prompts; row i has `images_per_row[i]` images and a length of
    its own."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row, images in enumerate(images_per_row):
        ids = [BOS]
        for _ in range(images):
            ids += [IMAGE] * TOKENS
            ids += torch.randint(6, 64, (2,), generator=generator).tolist()
        ids += torch.randint(6, 64, (3 + 2 * row,), generator=generator).tolist()
        rows.append(ids)
    longest = max(map(len, rows))
    ids_BS = torch.tensor([[PAD] * (longest - len(r)) + r for r in rows])
    mask_BS = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS}
    if total := sum(images_per_row):
        pixels = torch.randn(total, 3, SIDE * 4, SIDE * 4, generator=generator)
        inputs["pixel_values"] = pixels
    return inputs
