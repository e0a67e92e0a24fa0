"""Contrastive loss of the class token: match an image to its caption among hundreds of others.

A caption tower, used in training only, embeds the attribute table of a scene. Negatives are the
other scenes of the batch, random scenes of the cache, and the same scene with one word of an object
or sign exchanged: only attention to objects and signs tells the last kind apart.
Shapes: B scenes, D width of the class token.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from jobs.training.scene_cache import GROUNDS, SIGNS, Array, SceneCache
from sppruner.tiny.layout import COLORS, SHAPES
from sppruner.tiny.model import DIGITS, WORDS

__all__ = ["CaptionContrast"]

_RANDOM_NEGATIVES: Final = 256
_COLOR_SLICE: Final = slice(0, len(COLORS))
_SHAPE_SLICE: Final = slice(len(COLORS), len(COLORS) + len(SHAPES))
_DIGIT_SLICE: Final = slice(WORDS.index(DIGITS[0]), WORDS.index(DIGITS[-1]) + 1)


class CaptionContrast(nn.Module):
    """InfoNCE between pooled class tokens and caption embeddings."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.entity = nn.Sequential(nn.Linear(len(WORDS) + 3, 256), nn.GELU(), nn.Linear(256, 256))
        self.caption = nn.Sequential(nn.GELU(), nn.Linear(256, width))
        self.image = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def forward(
        self, cls_BD: Tensor, cache: SceneCache, scenes: Array, rng: np.random.Generator
    ) -> Tensor:
        own = _build_table(cache, scenes)
        changed = np.concatenate([_exchange_words(own, rng), _exchange_words(own, rng)])
        random_scenes = _build_table(cache, rng.integers(0, len(cache), _RANDOM_NEGATIVES))
        tables = torch.from_numpy(np.concatenate([own, random_scenes, changed])).to(cls_BD.device)
        captions = nn.functional.normalize(self.caption(self.entity(tables).sum(1)), dim=-1)
        images = nn.functional.normalize(self.image(cls_BD), dim=-1)
        scores = self.log_scale.clamp(max=4.6).exp() * images.float() @ captions.float().T
        return nn.functional.cross_entropy(scores, torch.arange(len(scenes), device=scores.device))


def _build_table(cache: SceneCache, scenes: Array) -> Array:
    """(B, ENTITIES, W + 3) float32: W words, the centre and the presence of each entity."""
    words = cache.words[scenes].astype(np.float32)
    present = words.any(2, keepdims=True).astype(np.float32)
    return np.concatenate([words, cache.centers[scenes], present], 2)


def _exchange_words(tables: Array, rng: np.random.Generator) -> Array:
    """Each scene with the colour, shape or digit of one object or sign replaced by another word."""
    changed = tables.copy()
    for row, table in enumerate(changed):
        entity = rng.choice(np.flatnonzero(table[:GROUNDS, -1]))
        if entity >= SIGNS:
            words_of_kind = _DIGIT_SLICE
        else:
            words_of_kind = _COLOR_SLICE if rng.random() < 0.5 else _SHAPE_SLICE
        words = table[entity, words_of_kind]
        words[:] = np.roll(words, rng.integers(1, len(words)))
        changed[row] = table
    return changed
