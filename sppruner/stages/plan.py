"""Token counts by decoder layer: of one image (`TokenSchedule`) and of a batch (`StagePlan`).

Shapes: B batch rows, L tokens of the packed prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sppruner.errors import InputError

Scoring: TypeAlias = Literal["before", "stage"]
"""The attention of the last token that a stage ranks by: that of the layer before it, or that of
the stage's layer on the hidden states that enter it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSchedule:
    """The number of visual tokens of one image at each decoder layer."""

    before: int
    """Tokens that enter the decoder."""

    counted: int
    """Tokens as the method's budget counts them."""

    stages: tuple[tuple[int, int], ...] = ()
    """(layer, tokens) pairs, layers ascending: in front of the layer the image is pruned to so many
    tokens."""

    scoring: Scoring = "before"
    """The scores that the stages rank by."""

    def at(self, layer: int) -> int:
        """Tokens at `layer`."""
        tokens = self.before
        for first, kept in self.stages:
            if layer >= first:
                tokens = kept
        return tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagePlan:
    """The stages of a batch."""

    keep: dict[int, list[int]]
    """Layer → visual tokens that each row keeps there, [B]. A stage may drop tokens of any of the
    row's images, so the count is their sum."""

    attention_mask_BL: Tensor
    """The packed prompt's mask, 0 at padding."""

    visual_BL: Tensor
    """bool, True for visual tokens of the packed prompt."""

    stage_scored: dict[int, list[bool]] = field(default_factory=dict)
    """Layer → whether each row, [B], ranks by the scores of the stage's layer; rows of missing
    layers rank by the layer before."""

    renumber: bool = False
    """Whether the tokens that a stage keeps get consecutive positions from 0, from its layer on;
    not supported with M-RoPE."""

    @classmethod
    def from_schedules(
        cls,
        rows: Sequence[int],
        schedules: Sequence[TokenSchedule],
        *,
        attention_mask_BL: Tensor,
        visual_BL: Tensor,
        renumber: bool = False,
    ) -> StagePlan | None:
        """The plan of a batch whose image i belongs to prompt rows[i]; None if nothing is pruned
        inside the decoder.

        Raises InputError for a prompt that ends in an image: its last token scores the others and
        must be kept.
        """
        layers = sorted({layer for schedule in schedules for layer, _ in schedule.stages})
        if not layers:
            return None
        for row, schedule in zip(rows, schedules, strict=True):
            if schedule.stages and visual_BL[row, -1]:
                raise InputError(
                    f"prompt {row} ends in an image: a method that prunes inside the decoder ranks "
                    "tokens by the last one's attention, so put some text after the image"
                )
        keep = {layer: [0] * len(visual_BL) for layer in layers}
        scorings: dict[int, dict[int, Scoring]] = {layer: {} for layer in layers}
        for row, schedule in zip(rows, schedules, strict=True):
            for layer in layers:
                keep[layer][row] += schedule.at(layer)
            for layer, _ in schedule.stages:
                scorings[layer][row] = schedule.scoring
        stage_scored = {}
        for layer, by_row in scorings.items():
            # Rows that drop nothing there follow the others, so that one kind of score may suffice.
            default = "stage" if set(by_row.values()) == {"stage"} else "before"
            stage_scored[layer] = [
                by_row.get(row, default) == "stage" for row in range(len(visual_BL))
            ]
        return cls(
            keep=keep,
            attention_mask_BL=attention_mask_BL,
            visual_BL=visual_BL,
            stage_scored=stage_scored,
            renumber=renumber,
        )


def most_attended(row_BL: Tensor, visual_BL: Tensor, keep_B: Tensor) -> Tensor:
    """[B, L] bool: the `keep_B` visual tokens of each row with the most attention, earlier ones on
    ties; all of a row with fewer."""
    scores_BL = row_BL.masked_fill(~visual_BL, float("-inf"))
    order_BL = scores_BL.argsort(dim=1, descending=True, stable=True)
    rank_BL = torch.empty_like(order_BL)
    index_BL = torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL)
    rank_BL.scatter_(1, order_BL, index_BL)
    return visual_BL & (rank_BL < keep_B[:, None])
