"""DivPrune: the most diverse subset, by farthest-point sampling (arXiv 2503.02175).

    d_ij = 1 − cos(v_i, v_j) of projected features
    first pick: the token of largest distance to its nearest neighbour
    then, until k are kept: the token of largest distance to its nearest kept token

From paper and code: all of the above, the greedy solution of the max-min diversity problem; no
attention and no text. For an image of one plane (LLaVA-1.5, the Qwen families) the selection equals
that of the code.

Families that cut images into tiles or encode them at two resolutions (LLaVA-NeXT, LLaVA-OneVision,
InternVL, Idefics3, SmolVLM) differ: here each plane is a separate problem with a share of the
image's budget by its size, and row-end tokens are not candidates; they are kept only if the budget
has room after all planes. The released code (vbdi/divprune) solves one problem over all features of
the image's run (tiles, both resolutions and row ends), so that a token of one tile may represent a
similar one of another; it supports one image per prompt only.

Shapes: I planes that are selected together, N tokens of each plane, D width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from sppruner.selectors.base import Selector, mask_to_index
from sppruner.selectors.similarity import NEVER, GreedySubset, cosine_flops, cosines_INN
from sppruner.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class DivPruneSelector(Selector):
    """The most diverse tokens; no options."""

    name: ClassVar[str] = "divprune"

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        cosine_INN = cosines_INN([image.features_ND for image in images])
        # A token is not its own neighbour.
        cosine_INN.diagonal(dim1=1, dim2=2).fill_(NEVER)
        budget_I = torch.tensor(counts, device=cosine_INN.device)
        subset = GreedySubset(cosine_INN)
        subset.add_best(-cosine_INN.amax(dim=2), budget_I > 0)
        subset.add_farthest(budget_I - 1)
        return [Selection(index_K=mask_to_index(selected_N)) for selected_N in subset.selected_IN]

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The cosines of all pairs."""
        return cosine_flops(tokens, width)
