"""Which layer keeps how many tokens: of one image (`TokenSchedule`), of a batch (`StagePlan`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sppruner.errors import InputError

# Whose attention of the last token a stage goes by: the one that the layer before it has paid, or
# the one that the stage's own layer would pay to the states in front of it.
Scoring: TypeAlias = Literal["before", "stage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSchedule:
    """How many visual tokens of one image there are, layer by layer.

    before: those that enter the decoder. stages: (layer, tokens) pairs, layers ascending: in front
    of that layer the image is cut to so many. counted: what the method's budget speaks of.
    scoring: what the stages go by.
    """

    before: int
    counted: int
    stages: tuple[tuple[int, int], ...] = ()
    scoring: Scoring = "before"

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
    padding. visual_BL: where the packed prompt holds visual tokens. own: layer → rows, [B], that
    go by the scores of the stage's own layer there; where a layer is missing all go by the layer
    before. renumber: whether the tokens left by a stage are counted from 0 again, from its layer
    on; only for prompts that are counted so, not for M-RoPE.
    """

    keep: dict[int, list[int]]
    attention_mask_BL: Tensor
    visual_BL: Tensor
    stage_scored: dict[int, list[bool]] = field(default_factory=dict)
    renumber: bool = False

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
        ways: dict[int, dict[int, Scoring]] = {layer: {} for layer in layers}
        for row, schedule in zip(rows, schedules, strict=True):
            for layer in layers:
                keep[layer][row] += schedule.at(layer)
            for layer, _ in schedule.stages:
                ways[layer][row] = schedule.scoring
        stage_scored = {}
        for layer, way in ways.items():
            # Rows that lose nothing there do as the others do: one way of scoring may be enough.
            usual = "stage" if set(way.values()) == {"stage"} else "before"
            stage_scored[layer] = [way.get(row, usual) == "stage" for row in range(len(visual_BL))]
        return cls(
            keep=keep,
            attention_mask_BL=attention_mask_BL,
            visual_BL=visual_BL,
            stage_scored=stage_scored,
            renumber=renumber,
        )


def most_attended(row_BL: Tensor, visual_BL: Tensor, keep_B: Tensor) -> Tensor:
    """[B, L] bool: the `keep_B` visual tokens of each row with the most attention, the earlier one
    on a tie. A row that has fewer keeps them all."""
    scores_BL = row_BL.masked_fill(~visual_BL, float("-inf"))
    order_BL = scores_BL.argsort(dim=1, descending=True, stable=True)
    rank_BL = torch.empty_like(order_BL)
    places_BL = torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL)
    rank_BL.scatter_(1, order_BL, places_BL)
    return visual_BL & (rank_BL < keep_B[:, None])
