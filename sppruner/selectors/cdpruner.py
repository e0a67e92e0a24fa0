"""CDPruner: a conditional determinantal point process of the tokens (arXiv 2506.10967).

    L_ij = q_i cos(v_i, v_j) q_j of projected features, with quality
    q_i  = (r_i − min r + 1e-6) / (max r − min r) of text relevance r
    kept = the greedy maximum of det L: every time the token whose squared distance d² from the
           span of those already taken, in L, is largest. With j the token taken at step t, whose
           row of the Cholesky factor is c_t = (L_j − Σ_{s<t} c_sj c_s) / d_j,  d² ← d² − c_t²

Known from paper and code: all of the above. θ < 1 replaces q by exp(θ / (2 (1 − θ)) q), from
purely diverse at 0 towards purely relevant; the released code leaves it out, as θ = 1 does here.
OpenVINO's version for Qwen has θ 0.5, takes positive cosines with word embeddings for r and splits
the tokens in raster order into two halves that share the budget: `split_halves`.

Ours, other than the released code for LLaVA (Theia-4869/CDPruner at ed9c12d):
  relevance  defaults to word embeddings, since LLaVA checkpoints lack the text tower the paper uses
             ("clip", whose sign is `ClipText`'s, is the code's). Without text, or with one that
             tells no token from another, all qualities are 1.
  prompts    longer than the text tower's context (77 tokens) are cut in chunks either way, whose
             relevance is averaged. Ours each stand between a start and an end token of their own
             and hold 75 tokens of the prompt. The code tokenises the whole prompt once and cuts the
             result every 77 tokens, padded with zeros at the end: there the first chunk alone has a
             start token and the last alone the end token whose state CLIP reads, and the others
             are read at another place. Prompts of up to 75 tokens are the same. "embed" relevance
             has no chunks: it is the mean over all words of the prompt but stop words.
  scaling    min and max are those of each plane (a whole image or one tile), where the code takes
             them over the whole tensor, all tiles of all images of a batch together.
  tiles      each plane is a determinantal process of its own, as each tile is in the code. The
             budget counts what the prompt holds and is shared by the planes by size, and row ends
             are not candidates (they stay where there is room beside all planes). The code gives
             every tile the same number, drops what lies in padding afterwards, and keeps every row
             end on top.
  span       where it is used up, d² is rounding and the quality decides alone; the code goes on
             with the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sppruner.selectors.base import from_mask
from sppruner.selectors.options import RelevanceOptions, relevance_IN, within
from sppruner.selectors.similarity import NEVER, cosine_flops, cosines_INN
from sppruner.spec import shares
from sppruner.types import Selection, VisualTokens

# Below this share of a token's own q², what is left of it is rounding.
_NOTHING = 1e-6


@dataclass(frozen=True, kw_only=True)
class CDPrunerSelector(RelevanceOptions):
    """theta, split_halves: see the module's docstring."""

    name: ClassVar[str] = "cdpruner"
    theta: float = 1.0
    split_halves: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, ("theta",), 0, 1)

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        n = images[0].count
        quality_IN = self._quality(images)
        sizes = [n // 2, n - n // 2] if self.split_halves else [n]
        wanted = torch.tensor([shares(k, sizes) for k in counts], device=quality_IN.device)
        taken, start = [], 0
        for wanted_I, size in zip(wanted.T, sizes, strict=True):
            part = slice(start, start + size)
            cosine_IMM = cosines_INN([image.features_ND[part] for image in images])
            taken.append(_greedy_map(cosine_IMM, quality_IN[:, part], wanted_I))
            start += size
        return [Selection(index_K=from_mask(taken_N)) for taken_N in torch.cat(taken, dim=1)]

    def _quality(self, images: Sequence[VisualTokens]) -> Tensor:
        """q of every token, [I, N]; its scale does not matter to the greedy maximum."""
        text_IN = relevance_IN(images)
        low_I1 = text_IN.amin(dim=1, keepdim=True)
        span_I1 = text_IN.amax(dim=1, keepdim=True) - low_I1
        quality_IN = torch.where(span_I1 > 0, (text_IN - low_I1 + 1e-6) / span_I1, 1.0)
        if self.theta < 1:
            # Less 1, so that a θ close to 1 does not overflow.
            quality_IN = (self.theta / (2 * (1 - self.theta)) * (quality_IN - 1)).exp()
        return quality_IN.clamp(min=1e-8)

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The cosines of all pairs, and the Cholesky rows: each takes those before it away."""
        return cosine_flops(tokens, width) + kept * kept * tokens


def _greedy_map(cosine_INN: Tensor, quality_IN: Tensor, wanted_I: Tensor) -> Tensor:
    """The greedy maximum of the determinant, [I, N] bool; `wanted_I` tokens of each image. No value
    leaves the device inside the loop."""
    steps = int(wanted_I.max())
    # Row t of the Cholesky factor of each image.
    factor_ISN = cosine_INN.new_empty(len(cosine_INN), steps, cosine_INN.shape[2])
    left_IN = quality_IN.square()
    least_IN = _NOTHING * left_IN
    taken_IN = torch.zeros_like(left_IN, dtype=torch.bool)
    for step in range(steps):
        gain_IN = torch.maximum(left_IN, least_IN)
        best_I1 = gain_IN.masked_fill(taken_IN, NEVER).argmax(dim=1, keepdim=True)
        column_IS1 = best_I1[:, :, None]
        cosine_IN = cosine_INN.gather(1, column_IS1.expand(-1, -1, left_IN.shape[1]))[:, 0]
        row_IN = quality_IN.gather(1, best_I1) * cosine_IN * quality_IN
        if step > 0:
            before_ISN = factor_ISN[:, :step]
            at_IS1 = before_ISN.gather(2, column_IS1.expand(-1, step, -1))
            row_IN = row_IN - (at_IS1.mT @ before_ISN)[:, 0]
        row_IN = row_IN / gain_IN.gather(1, best_I1).sqrt()
        factor_ISN[:, step] = row_IN
        left_IN = left_IN - row_IN.square()
        active_I1 = (step < wanted_I)[:, None]
        taken_IN.scatter_(1, best_I1, taken_IN.gather(1, best_I1) | active_I1)
    return taken_IN
