"""The common token space: what a visual token should say, fixed before anything is trained.

Word embeddings are fixed orthonormal directions, and the *oracle* token of a patch is the sum of
the words it shows, a mark on object centres, and its place. The language model can thus
learn without images and the vision tower without a language model. Source: our own recipe.
Shapes: B scenes, N = 144 patches, W words, P = 8 waves, D = 128.
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

__all__ = ["ANCHOR", "CHANNELS", "THING", "TokenSpace", "Truth"]

_WIDTH: Final = 128
_PLACES: Final = 8
_TEXT_MARK: Final = 0.5
# Inflected forms share most of their word's direction, so a question finds its patches.
_ALIASES: Final = {**PLURALS, "colour": "color"}

ANCHOR: Final = len(WORDS)
THING: Final = len(WORDS) + 1
CHANNELS: Final = len(WORDS) + 2
"""Words, then the anchor (an object's centre), then thingness (any part of an object or sign)."""


class Truth:
    """What each patch of a batch of scenes shows.

    A patch tells its own colour and place. What a thing is (shape, size, digit) and where its
    centre lies is told only by the patches around that centre.
    """

    def __init__(self, cache: SceneCache, scenes: Array, device: torch.device) -> None:
        owners = cache.owners[scenes].astype(np.int64)
        cores = cache.cores[scenes][..., None]
        rows = np.arange(len(scenes))[:, None]
        words = cache.words[scenes][rows, owners]
        words = np.where(cores, words, words & _SURFACE | _OWN_WORDS)
        centers = np.where(cores, cache.centers[scenes][rows, owners], PATCH_CENTERS)
        stains = cache.stains[scenes]
        things = owners < GROUNDS
        stained = (stains != BARE) & ~things
        words[stained, _COLOR_CHANNELS[stains[stained]]] = True
        marks = [words, cache.anchors[scenes][..., None], things[..., None]]
        self.marks_BNC = torch.from_numpy(np.concatenate(marks, 2).astype(np.float32)).to(device)
        """Channels of `CHANNELS`: (B, 144, C)."""
        phases = np.pi * (centers - 0.5)[..., None] * (1, 2)
        waves = np.concatenate([np.sin(phases), np.cos(phases)], 3).reshape(*centers.shape[:2], -1)
        self.places_BNP = torch.from_numpy(waves.astype(np.float32)).to(device)
        """Sines and cosines of x and y at half and one period per image, (B, 144, 8). The product
        for two places is cos(pi d) + cos(2 pi d) for their distance d along x, plus the same along
        y. It falls with d up to 0.58, about half of the image, so that what is near is found as
        what is alike."""
        self.things_BN = torch.from_numpy(things).to(device)
        """True on objects and signs."""
        self.cores_BN = torch.from_numpy(cores[..., 0]).to(device)
        """True on the patches around their centres."""
        self.signs_BN = torch.from_numpy(things & (owners >= SIGNS)).to(device)


def _own_words() -> Array:
    words = np.zeros((len(PATCH_CENTERS), len(WORDS)), dtype=bool)
    for patch, (x, y) in enumerate(PATCH_CENTERS):
        words[patch, WORDS.index(ROWS[int(y * 3)])] = True
        words[patch, WORDS.index(COLUMNS[int(x * 3)])] = True
    return words


_OWN_WORDS: Final = _own_words()
_COLOR_CHANNELS: Final = np.array([WORDS.index(color) for color in COLORS])
_SURFACE: Final = np.isin(WORDS, (*COLORS, *BACKGROUNDS, *TEXTURES))


_TAKEN: Final = CHANNELS + _PLACES + 2


class TokenSpace:
    """Orthonormal directions for channels, places and token types, from one fixed seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(20)
        basis = torch.linalg.qr(torch.randn(_WIDTH, _WIDTH, generator=generator)).Q.T
        self.marks_CD = basis[:CHANNELS].to(device)
        self.places_PD = basis[CHANNELS : CHANNELS + _PLACES].to(device)
        self.visual_D = basis[CHANNELS + _PLACES].to(device)
        self.text_D = basis[CHANNELS + _PLACES + 1].to(device)
        self.shown_SD = basis[: CHANNELS + _PLACES].to(device)
        """All that tells visual tokens apart: channels and places."""
        self.embedding_VD = self._embedding(tokenizer, basis, generator).to(device)

    def _embedding(
        self, tokenizer: PreTrainedTokenizerFast, basis: Tensor, generator: torch.Generator
    ) -> Tensor:
        free = list(basis[_TAKEN:])
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        rows: dict[str, Tensor] = {}
        for word, _ in vocabulary:
            if word in WORDS:
                rows[word] = basis[WORDS.index(word)]
            elif free:
                rows[word] = free.pop(0)
            else:
                # Letters and punctuation come last and make do without exact orthogonality.
                used = basis[:_TAKEN]
                row = torch.randn(_WIDTH, generator=generator)
                row -= used.T @ (used @ row)
                rows[word] = row / row.norm()
        for word, stem in _ALIASES.items():
            rows[word] = 0.8 * rows[stem] + 0.6 * rows[word]
        text = basis[_TAKEN - 1]
        return torch.stack([rows[word] + _TEXT_MARK * text for word, _ in vocabulary])

    def tokens(self, marks_BNC: Tensor, places_BNP: Tensor) -> Tensor:
        """(B, N, D) tokens for given marks and places."""
        return marks_BNC @ self.marks_CD + places_BNP @ self.places_PD + self.visual_D

    def oracle(self, truth: Truth) -> Tensor:
        """The token every patch should become."""
        return self.tokens(truth.marks_BNC, truth.places_BNP)

    def noisy_oracle(self, truth: Truth, generator: torch.Generator) -> Tensor:
        """Oracle tokens as an imperfect vision tower would emit them."""
        marks, places = truth.marks_BNC, truth.places_BNP
        kept = torch.rand(marks.shape, generator=generator).to(marks.device) > 0.03
        noise = torch.randn(marks.shape, generator=generator).to(marks.device)
        shift = torch.randn(places.shape, generator=generator).to(places.device)
        return self.tokens(marks * kept + 0.1 * noise, places + 0.06 * shift)

    def read(self, tokens_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Marks (B, N, C) and places (B, N, P) that tokens express; inverse of `tokens`."""
        return tokens_BND @ self.marks_CD.T, tokens_BND @ self.places_PD.T
