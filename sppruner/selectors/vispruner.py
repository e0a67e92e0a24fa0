"""VisPruner: important tokens by attention, then others without duplicates (arXiv 2412.01818).

    important   the ⌊r K⌋ tokens of largest attention
    diverse     the others, ordered by attention, are dealt alternately into two lists; the 8 tokens
                of the first list most similar to one of the second are dropped (cosines of encoder
                states); the remaining ones, most duplicated first, are put in front of the second
                list, and the round repeats until K − ⌊r K⌋ are left

From paper and code: all of the above, with r 0.5 and 8 tokens a round, and the result in raster
order. Ours: ties keep the order of the list. No text.

Shapes: I planes that are selected together, J of them with one budget, N tokens of each plane, K
kept tokens, R tokens of a list, A and B those of its two halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sppruner.selectors.options import SaliencyOption, check_range
from sppruner.selectors.saliency import saliency_IN
from sppruner.selectors.similarity import cosine_flops, cosines_INN, encoder_states
from sppruner.types import Selection, VisualTokens

_PER_ROUND = 8


@dataclass(frozen=True, kw_only=True)
class VisPrunerSelector(SaliencyOption):
    """Important and diverse tokens."""

    name: ClassVar[str] = "vispruner"

    important: float = 0.5
    """r, 0 to 1: the share of the budget for important tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ("important",), 0, 1)

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        order_IN = saliency_IN(images, self.saliency).argsort(dim=1, descending=True, stable=True)
        cosine_INN = cosines_INN([encoder_states(image) for image in images])
        selections: dict[int, Selection] = {}
        # Images of one budget go through the same rounds.
        for k in set(counts):
            members = [i for i, count in enumerate(counts) if count == k]
            at_J = torch.tensor(members, device=order_IN.device)
            important = int(self.important * k)
            diverse_JK = _deduplicate(order_IN[at_J, important:], cosine_INN[at_J], k - important)
            kept_JK = torch.cat([order_IN[at_J, :important], diverse_JK], dim=1).sort(dim=1).values
            focus_JK = (kept_JK[:, :, None] == order_IN[at_J, None, :important]).any(dim=2)
            for i, index_K, focus_K in zip(members, kept_JK, focus_JK, strict=True):
                selections[i] = Selection(index_K=index_K, focus_K=focus_K)
        return [selections[i] for i in range(len(images))]

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The cosines of all pairs, with encoder states counted at the features' width."""
        return cosine_flops(tokens, width)


def _deduplicate(list_JR: Tensor, cosine_JNN: Tensor, remaining: int) -> Tensor:
    """The `remaining` tokens of each image's list after rounds that drop duplicates."""
    if remaining == 0:
        return list_JR[:, :0]
    at_J11 = torch.arange(len(list_JR), device=list_JR.device)[:, None, None]
    while list_JR.shape[1] > remaining:
        first_JA, second_JB = list_JR[:, ::2], list_JR[:, 1::2]
        dropped = min(_PER_ROUND, list_JR.shape[1] - remaining, first_JA.shape[1])
        similarity_JA = cosine_JNN[at_J11, first_JA[:, :, None], second_JB[:, None]].amax(dim=2)
        kept_JA = similarity_JA.argsort(dim=1, descending=True, stable=True)[:, dropped:]
        list_JR = torch.cat([first_JA.gather(1, kept_JA), second_JB], dim=1)
    return list_JR
