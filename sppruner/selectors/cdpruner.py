"""CDPruner: a conditional determinantal point process of the tokens (arXiv 2506.10967).

    L_ij = q_i cos(v_i, v_j) q_j of projected features, with quality
    q_i  = (r_i − min r + 1e-6) / (max r − min r) of text relevance r
    kept = the greedy maximum of det L: at each step the token of largest squared distance d² from
           the span, in L, of the tokens selected so far. With j the token selected at step t, whose
           row of the Cholesky factor is c_t = (L_j − Σ_{s<t} c_sj c_s) / d_j,  d² ← d² − c_t²

From paper and code: all of the above. θ < 1 replaces q by exp(θ / (2 (1 − θ)) q), from purely
diverse at 0 towards purely relevant; the released code does not do this, and neither does θ = 1
here. OpenVINO's version for Qwen has θ 0.5, takes positive cosines with word embeddings for r and
splits the tokens in raster order into two halves that share the budget: `split_halves`.

Ours differs from the released code for LLaVA (Theia-4869/CDPruner at ed9c12d) in:
  relevance  defaults to word embeddings, since LLaVA checkpoints lack the text tower of the paper
             ("clip", with the sign of `ClipText`, is the code's). Without text, or if relevance is
             the same for all tokens, all qualities are 1.
  prompts    longer than the text tower's context (77 tokens) are split into chunks by both, and
             their relevance is averaged. Here each chunk has its own start and end token and 75
             tokens of the prompt. The code tokenises the whole prompt once and cuts the result
             every 77 tokens, padded with zeros at the end: there only the first chunk has a start
             token and only the last the end token whose state CLIP reads, and the others are read
             at another position. Prompts of up to 75 tokens are equal. "embed" relevance has no
             chunks: it is the mean over all words of the prompt except stop words.
  scaling    min and max are those of each plane (a whole image or one tile); the code takes them
             over the whole tensor, all tiles of all images of a batch together.
  tiles      each plane is a separate determinantal process, as each tile is in the code. The budget
             counts all visual tokens of the prompt and is shared by the planes by size, and row
             ends are not candidates (they are kept if the budget has room after all planes). The
             code gives every tile the same number, drops tokens in the padding afterwards, and
             keeps every row end in addition.
  span       once the selected tokens span the features, d² is rounding error and quality alone
             decides; the code continues with the rounding error.

Shapes: I planes that are selected together, N tokens of each plane, M tokens of one half, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sppruner.selectors.base import mask_to_index
from sppruner.selectors.options import RelevanceOptions, check_range, relevance_IN
from sppruner.selectors.similarity import NEVER, cosine_flops, cosines_INN
from sppruner.spec import shares
from sppruner.types import Selection, VisualTokens

# Below this share of a token's q², its d² is rounding error.
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class CDPrunerSelector(RelevanceOptions):
    """A diverse subset weighted by relevance."""

    name: ClassVar[str] = "cdpruner"

    theta: float = 1.0
    """θ, 0 (diversity only) to 1 (the released code's quality)."""

    split_halves: bool = False
    """Whether the two halves of the tokens in raster order are selected separately and share the
    budget, as in OpenVINO's version for Qwen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ("theta",), 0, 1)

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        n = images[0].count
        quality_IN = self._quality(images)
        sizes = [n // 2, n - n // 2] if self.split_halves else [n]
        budgets = torch.tensor([shares(k, sizes) for k in counts], device=quality_IN.device)
        selected, start = [], 0
        for budget_I, size in zip(budgets.T, sizes, strict=True):
            part = slice(start, start + size)
            cosine_IMM = cosines_INN([image.features_ND[part] for image in images])
            selected.append(_greedy_map(cosine_IMM, quality_IN[:, part], budget_I))
            start += size
        return [Selection(index_K=mask_to_index(mask_N)) for mask_N in torch.cat(selected, dim=1)]

    def _quality(self, images: Sequence[VisualTokens]) -> Tensor:
        """q of each token, [I, N]; the greedy maximum does not depend on its scale."""
        text_IN = relevance_IN(images)
        low_I1 = text_IN.amin(dim=1, keepdim=True)
        span_I1 = text_IN.amax(dim=1, keepdim=True) - low_I1
        quality_IN = torch.where(span_I1 > 0, (text_IN - low_I1 + 1e-6) / span_I1, 1.0)
        if self.theta < 1:
            # The −1 prevents overflow for θ close to 1.
            quality_IN = (self.theta / (2 * (1 - self.theta)) * (quality_IN - 1)).exp()
        return quality_IN.clamp(min=1e-8)

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The cosines of all pairs, and the Cholesky rows, each of which subtracts the earlier
        ones."""
        return cosine_flops(tokens, width) + kept * kept * tokens


def _greedy_map(cosine_INN: Tensor, quality_IN: Tensor, budget_I: Tensor) -> Tensor:
    """The greedy maximum of the determinant, [I, N] bool, with `budget_I` tokens of each image. No
    value leaves the device inside the loop."""
    steps = int(budget_I.max())
    # Row t of the Cholesky factor of each image.
    factor_ISN = cosine_INN.new_empty(len(cosine_INN), steps, cosine_INN.shape[2])
    distance_IN = quality_IN.square()
    least_IN = _ROUNDING * distance_IN
    selected_IN = torch.zeros_like(distance_IN, dtype=torch.bool)
    for step in range(steps):
        gain_IN = torch.maximum(distance_IN, least_IN)
        best_I1 = gain_IN.masked_fill(selected_IN, NEVER).argmax(dim=1, keepdim=True)
        column_IS1 = best_I1[:, :, None]
        cosine_IN = cosine_INN.gather(1, column_IS1.expand(-1, -1, distance_IN.shape[1]))[:, 0]
        row_IN = quality_IN.gather(1, best_I1) * cosine_IN * quality_IN
        if step > 0:
            before_ISN = factor_ISN[:, :step]
            at_IS1 = before_ISN.gather(2, column_IS1.expand(-1, step, -1))
            row_IN = row_IN - (at_IS1.mT @ before_ISN)[:, 0]
        row_IN = row_IN / gain_IN.gather(1, best_I1).sqrt()
        factor_ISN[:, step] = row_IN
        distance_IN = distance_IN - row_IN.square()
        active_I1 = (step < budget_I)[:, None]
        selected_IN.scatter_(1, best_I1, selected_IN.gather(1, best_I1) | active_I1)
    return selected_IN
