"""Pruning inside the decoder: which layer drops how many tokens, and the driver that does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
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
    """The stages of a batch. keep: layer → tokens each row keeps there, [B]; rows without a stage
    at that layer keep what they have. visual_BL: where the packed prompt holds visual tokens."""

    keep: dict[int, list[int]]
    visual_BL: Tensor

    @classmethod
    def of(
        cls, rows: Sequence[int], schedules: Sequence[Schedule], *, visual_BL: Tensor
    ) -> StagePlan | None:
        """The plan of a batch whose image i lies in prompt rows[i]; None where nothing is pruned
        inside the decoder."""
        layers = sorted({layer for schedule in schedules for layer, _ in schedule.stages})
        if not layers:
            return None
        keep = {layer: [0] * len(visual_BL) for layer in layers}
        for layer in layers:
            for row, schedule in zip(rows, schedules, strict=True):
                keep[layer][row] += schedule.at(layer)
        return cls(keep=keep, visual_BL=visual_BL)


class StageDriver:
    """Prunes inside the decoder during one `generate` call, as a context manager."""

    def __init__(self, adapter: Any, plan: StagePlan) -> None:
        self.adapter = adapter
        self.plan = plan

    def __enter__(self) -> StageDriver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None
