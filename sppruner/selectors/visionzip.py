"""VisionZip: dominant tokens by attention, the others merged into a few (arXiv 2412.04467).

    dominant      the K − C tokens of largest attention
    targets       every ⌊rest / C⌋-th of the rest in raster order, C tokens
    assignment    each remaining token is assigned to the target of largest cosine between head-mean
                  attention keys
    contextual    target + mean(assigned), in the encoder's states before the projector

From paper and code: all of the above; splits 162+30, 108+20 and 54+10 of 192, 128 and 64, so C is
10/64 of the budget; the sum of target and mean roughly doubles a state's norm, which is what the
published code does and what its figures were measured with. Ours: `average` takes the plain mean of
target and assigned tokens instead; contextual tokens take their targets' positions in raster order,
where the code appends them at the end; the CLS token is not kept, and its place in the budget goes
to a patch; families whose projector does not work token by token merge projected features.

Shapes: I planes that are selected together, N tokens of each plane, V width of the encoder states,
M tokens that are not dominant (in `other_M`, `group_M` and `assigned_CM` without the targets), C
contextual and K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sppruner.selectors.base import mask_to_index
from sppruner.selectors.options import SaliencyOption, check_range
from sppruner.selectors.saliency import saliency_IN
from sppruner.selectors.similarity import encoder_states
from sppruner.signals import KEYS
from sppruner.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VisionZipSelector(SaliencyOption):
    """Dominant and contextual tokens."""

    name: ClassVar[str] = "visionzip"

    contextual: float = 10 / 64
    """C as a share of the budget, 0 to 1."""

    average: bool = False
    """Whether a contextual token is the plain mean of its target and the assigned tokens, not
    target plus mean as in the published code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ("contextual",), 0, 1)

    @property
    def signals(self) -> frozenset[str]:
        return super().signals | {KEYS}

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        order_IN = saliency_IN(images, self.saliency).argsort(dim=1, descending=True, stable=True)
        selections = []
        for image, order_N, k in zip(images, order_IN, counts, strict=True):
            contextual = math.floor(self.contextual * k + 0.5)
            selections.append(self._merge(image, order_N, k - contextual, contextual))
        return selections

    def _merge(
        self, image: VisualTokens, order_N: Tensor, dominant: int, contextual: int
    ) -> Selection:
        if contextual == 0:
            return Selection(index_K=order_N[:dominant].sort().values)
        rest_M = order_N[dominant:].sort().values
        step = len(rest_M) // contextual
        rank_M = torch.arange(len(rest_M), device=rest_M.device)
        is_target_M = (rank_M % step == 0) & (rank_M < step * contextual)
        target_C, other_M = rest_M[is_target_M], rest_M[~is_target_M]

        keys_NV = normalize(image.signals[KEYS].float(), dim=-1)
        group_M = (keys_NV[other_M] @ keys_NV[target_C].T).argmax(dim=1)
        assigned_CM = (torch.arange(contextual, device=group_M.device)[:, None] == group_M).float()
        states_NV = encoder_states(image)
        sum_CV = assigned_CM @ states_NV[other_M].float()
        count_C1 = assigned_CM.sum(dim=1, keepdim=True)
        target_CV = states_NV[target_C].float()
        if self.average:
            merged_CV = (target_CV + sum_CV) / (1 + count_C1)
        else:
            merged_CV = target_CV + sum_CV / count_C1.clamp(min=1)

        merged_NV = states_NV.clone()
        merged_NV[target_C] = merged_CV.to(states_NV.dtype)
        kept_N = torch.zeros_like(order_N, dtype=torch.bool)
        kept_N[order_N[:dominant]] = True
        focus_N = kept_N.clone()
        kept_N[target_C] = True
        index_K = mask_to_index(kept_N)
        projected = image.hidden_NV is None
        return Selection(
            index_K=index_K,
            replace_KD=merged_NV[index_K] if projected else None,
            replace_KV=None if projected else merged_NV[index_K],
            focus_K=focus_N[index_K],
        )

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The merging product, with encoder states counted at the features' width; that of the
        keys, which are narrower by the number of heads, is not modelled."""
        return 2 * math.floor(self.contextual * kept + 0.5) * (tokens - kept) * width
