"""VisPruner: important tokens by attention, then the rest without duplicates (arXiv 2412.01818).

    important   the ⌊r K⌋ tokens of largest attention
    diverse     the others, ordered by attention, are split by turns into two lists; of the first
                list the 8 tokens most like one of the second are dropped (cosines of encoder
                states); those that stay, most duplicated first, are put in front of the second
                list, and the round is repeated until K − ⌊r K⌋ are left

Known from paper and code: all of the above, with r 0.5 and 8 a round. Ours: equal scores keep the
order of the list; raster order of the result is as in the code. No text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sppruner.selectors.base import saliency_IN
from sppruner.selectors.options import SaliencyOption, within
from sppruner.selectors.similarity import cosine_flops, cosines_INN, encoder_states
from sppruner.types import Selection, VisualTokens

_PER_ROUND = 8


@dataclass(frozen=True, kw_only=True)
class VisPrunerSelector(SaliencyOption):
    """important: r of the module's docstring."""

    name: ClassVar[str] = "vispruner"
    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, ("important",), 0, 1)

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        order_IN = saliency_IN(images, self.saliency).argsort(dim=1, descending=True, stable=True)
        cosine_INN = cosines_INN([encoder_states(image) for image in images])
        chosen: dict[int, Selection] = {}
        # Images of one budget take the same rounds.
        for k in set(counts):
            members = [i for i, count in enumerate(counts) if count == k]
            at_J = torch.tensor(members, device=order_IN.device)
            important = int(self.important * k)
            diverse_JK = _distinct(order_IN[at_J, important:], cosine_INN[at_J], k - important)
            kept_JK = torch.cat([order_IN[at_J, :important], diverse_JK], dim=1).sort(dim=1).values
            focus_JK = (kept_JK[:, :, None] == order_IN[at_J, None, :important]).any(dim=2)
            for i, index_K, focus_K in zip(members, kept_JK, focus_JK, strict=True):
                chosen[i] = Selection(index_K=index_K, focus_K=focus_K)
        return [chosen[i] for i in range(len(images))]

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The cosines of all pairs, counting the encoder's states as if they had the features'
        width."""
        return cosine_flops(tokens, width)


def _distinct(list_JR: Tensor, cosine_JNN: Tensor, left: int) -> Tensor:
    """`left` tokens of each image's list, from which duplicates are dropped round by round."""
    if left == 0:
        return list_JR[:, :0]
    at_J11 = torch.arange(len(list_JR), device=list_JR.device)[:, None, None]
    while list_JR.shape[1] > left:
        first_JA, second_JB = list_JR[:, ::2], list_JR[:, 1::2]
        dropped = min(_PER_ROUND, list_JR.shape[1] - left, first_JA.shape[1])
        alike_JA = cosine_JNN[at_J11, first_JA[:, :, None], second_JB[:, None]].amax(dim=2)
        stay_JA = alike_JA.argsort(dim=1, descending=True, stable=True)[:, dropped:]
        list_JR = torch.cat([first_JA.gather(1, stay_JA), second_JB], dim=1)
    return list_JR
