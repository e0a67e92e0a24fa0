"""The common token space: what a visual token should say, fixed before anything is trained.

Word embeddings are fixed orthonormal directions, and the *oracle* token of a patch is the sum of
the words true of it, a mark on object centres, and its coordinates. The language model can thus
learn without images and the vision tower without a language model. Source: our own recipe.
Shapes: B scenes, N = 144 patches, W words, D = 128.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sppruner.tiny.model import IMAGE_SIDE, PATCH_SIDE, PLURALS, VISUAL_TOKENS, WORDS
from sppruner.tiny.questions import COLUMNS, ROWS
from sppruner.tiny.recipe.cache import BACKGROUND, SIGN, Array, SceneCache

__all__ = ["TokenSpace", "Truth"]

_WIDTH: Final = 128
_XY_GAIN: Final = 3.0
_TEXT_MARK: Final = 0.5
_SIDE: Final = IMAGE_SIDE // PATCH_SIDE
# Inflected forms share most of their word's direction, so a question finds its patches.
_ALIASES: Final = {**PLURALS, "colour": "color"}


class Truth:
    """What is true of each patch of a batch of scenes."""

    def __init__(self, cache: SceneCache, scenes: Array, device: torch.device) -> None:
        owners = cache.owners[scenes].astype(np.int64)
        rows = np.arange(len(scenes))[:, None]
        words = cache.words[scenes][rows, owners].astype(np.float32)
        centers = cache.centers[scenes][rows, owners]
        behind = owners == BACKGROUND
        words[behind] += np.broadcast_to(_OWN_WORDS, words.shape)[behind]
        centers = np.where(behind[..., None], _OWN_CENTERS, centers)
        marks = cache.anchors[scenes].astype(np.float32)[..., None]
        self.marks_BNC = torch.from_numpy(np.concatenate([words, marks], 2)).to(device)
        """Word channels, then the anchor channel: (B, 144, W + 1)."""
        self.xy_BN2 = torch.from_numpy((centers - 0.5).astype(np.float32)).to(device)
        """Centre of what the patch shows, relative to the image centre."""
        self.foreground_BN = torch.from_numpy(~behind).to(device)
        """True on objects and signs."""
        self.objects_BN = torch.from_numpy((owners != BACKGROUND) & (owners != SIGN)).to(device)


def _own_labels() -> tuple[Array, Array]:
    words = np.zeros((VISUAL_TOKENS, len(WORDS)), dtype=np.float32)
    row, column = np.divmod(np.arange(VISUAL_TOKENS), _SIDE)
    centers = np.stack([(column + 0.5) / _SIDE, (row + 0.5) / _SIDE], 1).astype(np.float32)
    for patch, (x, y) in enumerate(centers):
        words[patch, WORDS.index(ROWS[int(y * 3)])] = 1
        words[patch, WORDS.index(COLUMNS[int(x * 3)])] = 1
    return words, centers


_OWN_WORDS, _OWN_CENTERS = _own_labels()


class TokenSpace:
    """Orthonormal directions for words, anchor, x, y and token type, from one fixed seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(20)
        basis = torch.linalg.qr(torch.randn(_WIDTH, _WIDTH, generator=generator)).Q.T
        count = len(WORDS)
        self.marks_CD = basis[: count + 1].to(device)
        self.xy_2D = basis[count + 1 : count + 3].to(device)
        self.visual_D = basis[count + 3].to(device)
        self.text_D = basis[count + 4].to(device)
        self.embedding_VD = self._embedding(tokenizer, basis, generator).to(device)

    def _embedding(
        self, tokenizer: PreTrainedTokenizerFast, basis: Tensor, generator: torch.Generator
    ) -> Tensor:
        free = list(basis[len(WORDS) + 5 :])
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        rows: dict[str, Tensor] = {}
        for word, _ in vocabulary:
            if word in WORDS:
                rows[word] = basis[WORDS.index(word)]
            elif free:
                rows[word] = free.pop(0)
            else:
                # Letters and punctuation come last and make do without exact orthogonality.
                used = basis[: len(WORDS) + 5]
                row = torch.randn(_WIDTH, generator=generator)
                row -= used.T @ (used @ row)
                rows[word] = row / row.norm()
        for word, stem in _ALIASES.items():
            rows[word] = 0.8 * rows[stem] + 0.6 * rows[word]
        text = basis[len(WORDS) + 4]
        return torch.stack([rows[word] + _TEXT_MARK * text for word, _ in vocabulary])

    def tokens(self, marks_BNC: Tensor, xy_BN2: Tensor) -> Tensor:
        """(B, N, D) tokens for given marks and coordinates."""
        return marks_BNC @ self.marks_CD + _XY_GAIN * xy_BN2 @ self.xy_2D + self.visual_D

    def oracle(self, truth: Truth) -> Tensor:
        """The token every patch should become."""
        return self.tokens(truth.marks_BNC, truth.xy_BN2)

    def noisy_oracle(self, truth: Truth, generator: torch.Generator) -> Tensor:
        """Oracle tokens as an imperfect vision tower would emit them."""
        marks, xy = truth.marks_BNC, truth.xy_BN2
        kept = torch.rand(marks.shape, generator=generator).to(marks.device) > 0.05
        noise = torch.randn(marks.shape, generator=generator).to(marks.device)
        shift = torch.randn(xy.shape, generator=generator).to(xy.device)
        return self.tokens(marks * kept + 0.1 * noise, xy + 0.02 * shift)

    def read(self, tokens_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Marks (B, N, C) and coordinates (B, N, 2) that tokens express; inverse of `tokens`."""
        return tokens_BND @ self.marks_CD.T, tokens_BND @ self.xy_2D.T / _XY_GAIN
