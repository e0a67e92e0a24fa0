"""The common token space: the content of a visual token, defined before training.

Word embeddings are fixed orthonormal directions, and the *oracle* token of a patch is the sum of
the words it shows, a mark on object centres, and its position. The language model can thus be
trained without images and the vision tower without a language model. Source: our own recipe.
Shapes: B scenes, N = 144 patches, W words, C channels, P = 8 waves, S = C + P, V vocabulary,
D = 128.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from jobs.training.scene_cache import BARE, GROUNDS, PATCH_CENTERS, SIGNS, Array, SceneCache
from sppruner.tiny.layout import BACKGROUNDS, COLORS, TEXTURES
from sppruner.tiny.model import PLURALS, WORDS
from sppruner.tiny.questions import COLUMNS, ROWS

__all__ = ["ANCHOR", "CHANNELS", "THING", "PatchTruth", "TokenSpace"]

_WIDTH: Final = 128
_PLACES: Final = 8
_TEXT_MARK: Final = 0.5
# Inflected forms share most of their word's direction, so that a question matches its patches.
_ALIASES: Final = {**PLURALS, "colour": "color"}

ANCHOR: Final = len(WORDS)
THING: Final = len(WORDS) + 1
CHANNELS: Final = len(WORDS) + 2
"""Words, then the anchor (an object's centre), then the mark of any part of an object or sign."""


class PatchTruth:
    """Ground truth of each patch of a batch of scenes.

    A patch has its own colour and position. Shape, size or digit of an entity, and the position of
    its centre, belong only to the patches around that centre.
    """

    def __init__(self, cache: SceneCache, scenes: Array, device: torch.device) -> None:
        owners = cache.owners[scenes].astype(np.int64)
        cores = cache.cores[scenes][..., None]
        rows = np.arange(len(scenes))[:, None]
        words = cache.words[scenes][rows, owners]
        words = np.where(cores, words, words & _SURFACE_CHANNELS | _POSITION_WORDS)
        centers = np.where(cores, cache.centers[scenes][rows, owners], PATCH_CENTERS)
        stains = cache.stains[scenes]
        things = owners < GROUNDS
        stained = (stains != BARE) & ~things
        words[stained, _COLOR_CHANNELS[stains[stained]]] = True
        marks = [words, cache.anchors[scenes][..., None], things[..., None]]
        self.marks_BNC = torch.from_numpy(np.concatenate(marks, 2).astype(np.float32)).to(device)
        """(B, 144, C): the channels of `CHANNELS`."""
        phases = np.pi * (centers - 0.5)[..., None] * (1, 2)
        waves = np.concatenate([np.sin(phases), np.cos(phases)], 3).reshape(*centers.shape[:2], -1)
        self.places_BNP = torch.from_numpy(waves.astype(np.float32)).to(device)
        """(B, 144, 8): sines and cosines of x and y at half and one period per image. The product
        of two positions is cos(pi d) + cos(2 pi d) for their distance d along x, plus the same
        along y. It decreases up to d = 0.58, about half of the image, so that near positions are
        similar vectors."""
        self.things_BN = torch.from_numpy(things).to(device)
        """True on objects and signs."""
        self.cores_BN = torch.from_numpy(cores[..., 0]).to(device)
        """True on the patches around their centres."""
        self.signs_BN = torch.from_numpy(things & (owners >= SIGNS)).to(device)


def _build_position_words() -> Array:
    words = np.zeros((len(PATCH_CENTERS), len(WORDS)), dtype=bool)
    for patch, (x, y) in enumerate(PATCH_CENTERS):
        words[patch, WORDS.index(ROWS[int(y * 3)])] = True
        words[patch, WORDS.index(COLUMNS[int(x * 3)])] = True
    return words


_POSITION_WORDS: Final = _build_position_words()
_COLOR_CHANNELS: Final = np.array([WORDS.index(color) for color in COLORS])
_SURFACE_CHANNELS: Final = np.isin(WORDS, (*COLORS, *BACKGROUNDS, *TEXTURES))


_USED_ROWS: Final = CHANNELS + _PLACES + 2


class TokenSpace:
    """Orthonormal directions for channels, positions and token types, from one fixed seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(20)
        basis = torch.linalg.qr(torch.randn(_WIDTH, _WIDTH, generator=generator)).Q.T
        self.marks_CD = basis[:CHANNELS].to(device)
        self.places_PD = basis[CHANNELS : CHANNELS + _PLACES].to(device)
        self.visual_D = basis[CHANNELS + _PLACES].to(device)
        self.text_D = basis[CHANNELS + _PLACES + 1].to(device)
        self.shown_SD = basis[: CHANNELS + _PLACES].to(device)
        """All directions in which visual tokens differ: channels and positions."""
        self.embedding_VD = self._embedding(tokenizer, basis, generator).to(device)

    def _embedding(
        self, tokenizer: PreTrainedTokenizerFast, basis: Tensor, generator: torch.Generator
    ) -> Tensor:
        free = list(basis[_USED_ROWS:])
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        rows: dict[str, Tensor] = {}
        for word, _ in vocabulary:
            if word in WORDS:
                rows[word] = basis[WORDS.index(word)]
            elif free:
                rows[word] = free.pop(0)
            else:
                # Letters and punctuation come last; their rows are only approximately orthogonal.
                used = basis[:_USED_ROWS]
                row = torch.randn(_WIDTH, generator=generator)
                row -= used.T @ (used @ row)
                rows[word] = row / row.norm()
        for word, stem in _ALIASES.items():
            rows[word] = 0.8 * rows[stem] + 0.6 * rows[word]
        text = basis[_USED_ROWS - 1]
        return torch.stack([rows[word] + _TEXT_MARK * text for word, _ in vocabulary])

    def tokens(self, marks_BNC: Tensor, places_BNP: Tensor) -> Tensor:
        """(B, N, D) tokens of given marks and positions."""
        return marks_BNC @ self.marks_CD + places_BNP @ self.places_PD + self.visual_D

    def oracle(self, truth: PatchTruth) -> Tensor:
        """(B, N, D): the target token of every patch."""
        return self.tokens(truth.marks_BNC, truth.places_BNP)

    def noisy_oracle(self, truth: PatchTruth, generator: torch.Generator) -> Tensor:
        """(B, N, D): oracle tokens with noise, as an imperfect vision tower would emit them."""
        marks, places = truth.marks_BNC, truth.places_BNP
        kept = torch.rand(marks.shape, generator=generator).to(marks.device) > 0.03
        noise = torch.randn(marks.shape, generator=generator).to(marks.device)
        shift = torch.randn(places.shape, generator=generator).to(places.device)
        return self.tokens(marks * kept + 0.1 * noise, places + 0.06 * shift)

    def read(self, tokens_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Marks (B, N, C) and positions (B, N, P) of tokens; the inverse of `tokens`."""
        return tokens_BND @ self.marks_CD.T, tokens_BND @ self.places_PD.T
