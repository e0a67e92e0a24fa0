"""Tiny random models and left-padded batches of every family, built from configs only.

Shapes: B batch rows, S prompt positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
"""Every family's decoder."""

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
"""Every family's tower but the Qwen ones."""


class Build(Protocol):
    def __call__(self, attention: str = "sdpa", *, seed: int = 0) -> Any:
        """A random model in float32 and eval mode, with weights large enough that its answers
        depend on the image."""


class Batch(Protocol):
    def __call__(self, images_per_row: Sequence[int], *, seed: int = 1) -> dict[str, Tensor]:
        """The inputs that the family's processor produces for prompts of different lengths with the
        given number of images each: left-padded, images of different sizes if the family supports
        them. A row may have no image; a batch without images has no pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family under test."""

    name: str
    """Its `model_type`."""
    build: Build
    """Builds a tiny random model."""
    batch: Batch
    """Builds a batch of inputs."""
    image_id: int
    """The id of its visual placeholder."""


def left_padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """input_ids and attention_mask of prompts of different lengths."""
    longest = max(map(len, rows))
    ids_BS = torch.tensor([[PAD] * (longest - len(r)) + list(r) for r in rows])
    mask_BS = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    return {"input_ids": ids_BS, "attention_mask": mask_BS}


def prompts(
    runs_per_row: Sequence[Sequence[Sequence[int]]], *, seed: int, first_word: int = 8
) -> list[list[int]]:
    """Prompts around image runs: a start token, each run followed by two words, then a question
    that is two words longer in each row. runs_per_row: the ids of each image's run, by row."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(first_word, 64, (count,), generator=generator).tolist()

    rows = []
    for row, runs in enumerate(runs_per_row):
        ids = [BOS]
        for run in runs:
            ids += [*run, *words(2)]
        rows.append([*ids, *words(3 + 2 * row)])
    return rows


def enlarge(model: Any, language: float = 8.0, other: float = 4.0) -> Any:
    """Scales matrices up, so that a random model's answers depend on its inputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(language if "language_model" in name else other)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model.eval()


__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "TEXT",
    "VISION",
    "Batch",
    "Build",
    "Family",
    "enlarge",
    "left_padded",
    "prompts",
]
