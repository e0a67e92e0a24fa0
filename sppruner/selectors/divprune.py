"""DivPrune: the most diverse subset, by farthest-point sampling (arXiv 2503.02175).

    d_ij = 1 − cos(v_i, v_j) of projected features
    first pick: the token of largest distance to its nearest neighbour
    then, until k are kept: the token of largest distance to its nearest kept token

All of it is the paper's and its code's: the greedy solution of the max-min diversity problem. No
attention and no text. For an image of one plane (LLaVA-1.5, the Qwen families) the choice is that
of the code.

Families that cut images into tiles or show them at two resolutions (LLaVA-NeXT, LLaVA-OneVision,
InternVL, Idefics3, SmolVLM) differ: here each plane is a problem of its own, with a share of the
image's budget by its size, and the row ends between them are not candidates: they stay only where
there is room beside all planes. The released code (vbdi/divprune) solves one problem over all
features of the image's run, tiles, both resolutions and row ends alike, so that a token of one tile
may stand for a like one of another; it also serves one image per prompt only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from sppruner.selectors.base import Selector, from_mask
from sppruner.selectors.similarity import NEVER, Picks, cosine_flops, cosines_INN
from sppruner.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class DivPruneSelector(Selector):
    """Has no options."""

    name: ClassVar[str] = "divprune"

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        cosine_INN = cosines_INN([image.features_ND for image in images])
        # A token is no neighbour of itself.
        cosine_INN.diagonal(dim1=1, dim2=2).fill_(NEVER)
        budget_I = torch.tensor(counts, device=cosine_INN.device)
        picks = Picks(cosine_INN)
        picks.take(-cosine_INN.amax(dim=2), budget_I > 0)
        picks.scan(budget_I - 1)
        return [Selection(index_K=from_mask(taken_N)) for taken_N in picks.taken_IN]

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The cosines of all pairs."""
        return cosine_flops(tokens, width)
