"""VisionZip: dominant tokens by attention, the rest merged into a few (arXiv 2412.04467).

    dominant      the K − C tokens of largest attention
    targets       of the rest, in raster order, every ⌊rest / C⌋-th, C of them
    assignment    each remaining token goes to the target of largest cosine between head-mean
                  attention keys
    contextual    target + mean(assigned), in the encoder's states before the projector

Known from paper and code: all of the above; splits 162+30, 108+20 and 54+10 of 192, 128 and 64, so
C is 10/64 of the budget; the sum of target and mean roughly doubles a state's norm, and that is
what the published code does and its figures were measured with. Ours: `average` gives the plain
mean of target and assigned instead; contextual tokens stand at their targets' places in raster
order, where the code appends them at the end; the CLS token is not kept, the budget goes to
patches; families whose projector does not work token by token merge projected features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sppruner.selectors.base import from_mask, saliency_IN
from sppruner.selectors.options import SaliencyOption, within
from sppruner.selectors.similarity import encoder_states
from sppruner.signals import KEYS
from sppruner.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VisionZipSelector(SaliencyOption):
    """contextual: share of the budget for merged tokens. average: see the module's docstring."""

    name: ClassVar[str] = "visionzip"
    contextual: float = 10 / 64
    average: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, ("contextual",), 0, 1)

    @property
    def signals(self) -> frozenset[str]:
        return super().signals | {KEYS}

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        order_IN = saliency_IN(images, self.saliency).argsort(dim=1, descending=True, stable=True)
        selections = []
        for image, order_N, k in zip(images, order_IN, counts, strict=True):
            merged = math.floor(self.contextual * k + 0.5)
            selections.append(self._zip(image, order_N, k - merged, merged))
        return selections

    def _zip(self, image: VisualTokens, order_N: Tensor, dominant: int, merged: int) -> Selection:
        if merged == 0:
            return Selection(index_K=order_N[:dominant].sort().values)
        rest_M = order_N[dominant:].sort().values
        step = len(rest_M) // merged
        place_M = torch.arange(len(rest_M), device=rest_M.device)
        is_target_M = (place_M % step == 0) & (place_M < step * merged)
        target_C, other_M = rest_M[is_target_M], rest_M[~is_target_M]

        keys_NV = normalize(image.signals[KEYS].float(), dim=-1)
        home_M = (keys_NV[other_M] @ keys_NV[target_C].T).argmax(dim=1)
        joins_CM = (torch.arange(merged, device=home_M.device)[:, None] == home_M).float()
        states_NV = encoder_states(image)
        summed_CV = joins_CM @ states_NV[other_M].float()
        guests_C1 = joins_CM.sum(dim=1, keepdim=True)
        own_CV = states_NV[target_C].float()
        if self.average:
            zipped_CV = (own_CV + summed_CV) / (1 + guests_C1)
        else:
            zipped_CV = own_CV + summed_CV / guests_C1.clamp(min=1)

        zipped_NV = states_NV.clone()
        zipped_NV[target_C] = zipped_CV.to(states_NV.dtype)
        kept_N = torch.zeros_like(order_N, dtype=torch.bool)
        kept_N[order_N[:dominant]] = True
        focus_N = kept_N.clone()
        kept_N[target_C] = True
        index_K = from_mask(kept_N)
        projected = image.hidden_NV is None
        return Selection(
            index_K=index_K,
            replace_KD=zipped_NV[index_K] if projected else None,
            replace_KV=None if projected else zipped_NV[index_K],
            focus_K=focus_N[index_K],
        )

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The merging product, counting the encoder's states as if they had the features' width;
        the keys are narrower by the number of heads."""
        return 2 * math.floor(self.contextual * kept + 0.5) * (tokens - kept) * width
