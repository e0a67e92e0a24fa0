"""Which layer keeps how many tokens: of one image (`TokenSchedule`), of a batch (`StagePlan`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sppruner.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSchedule:
    """How many visual tokens of one image there are, layer by layer.

    before: those that enter the decoder. stages: (layer, tokens) pairs, layers ascending: in front
    of that layer the image is cut to so many. counted: what the method's budget speaks of.
    """

    before: int
    counted: int
    stages: tuple[tuple[int, int], ...] = ()

    def at(self, layer: int) -> int:
        """Tokens at a layer."""
        tokens = self.before
        for first, kept in self.stages:
            if layer >= first:
                tokens = kept
        return tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagePlan:
    """The stages of a batch.

    keep: layer → visual tokens each row keeps there, [B]; a stage may drop tokens of any of the
    row's images, so it keeps the sum over them. attention_mask_BL: the packed prompt's, 0 at
    padding. visual_BL: where the packed prompt holds visual tokens.
    """

    keep: dict[int, list[int]]
    attention_mask_BL: Tensor
    visual_BL: Tensor

    @classmethod
    def of(
        cls,
        rows: Sequence[int],
        schedules: Sequence[TokenSchedule],
        *,
        attention_mask_BL: Tensor,
        visual_BL: Tensor,
    ) -> StagePlan | None:
        """The plan of a batch whose image i lies in prompt rows[i]; None where nothing is pruned
        inside the decoder.

        Raises InputError for a prompt that ends in an image: its last token is the one that
        chooses what stays and must stay itself.
        """
        layers = sorted({layer for schedule in schedules for layer, _ in schedule.stages})
        if not layers:
            return None
        for row, schedule in zip(rows, schedules, strict=True):
            if schedule.stages and visual_BL[row, -1]:
                raise InputError(
                    f"prompt {row} ends in an image: a method that prunes inside the decoder asks "
                    "the last token of the text, so put some text after the image"
                )
        keep = {layer: [0] * len(visual_BL) for layer in layers}
        for layer in layers:
            for row, schedule in zip(rows, schedules, strict=True):
                keep[layer][row] += schedule.at(layer)
        return cls(keep=keep, attention_mask_BL=attention_mask_BL, visual_BL=visual_BL)


def most_attended(row_BL: Tensor, visual_BL: Tensor, keep_B: Tensor) -> Tensor:
    """[B, L] bool: the `keep_B` visual tokens of each row with the most attention, the earlier one
    on a tie. A row that has fewer keeps them all."""
    scores_BL = row_BL.masked_fill(~visual_BL, float("-inf"))
    order_BL = scores_BL.argsort(dim=1, descending=True, stable=True)
    rank_BL = torch.empty_like(order_BL)
    places_BL = torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL)
    rank_BL.scatter_(1, order_BL, places_BL)
    return visual_BL & (rank_BL < keep_B[:, None])
