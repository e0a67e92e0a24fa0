"""PyramidDrop (arXiv 2410.17247): fewer tokens from stage to stage of the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sppruner.errors import SpecError
from sppruner.selectors.staged import StagedSelector
from sppruner.stages import TokenSchedule


@dataclass(frozen=True, kw_only=True)
class PyramidDropSelector(StagedSelector):
    """Each stage keeps the same share of what the one before left, by the attention of the last
    prompt token.

    Options: layers: in front of which tokens are dropped, such as "8,16,24"; left empty, at a
    quarter, half and three quarters of the depth, as the paper does. count: the budget is what
    stays after the last stage (the paper's share of 0.5 is a budget of 0.125), or with "average"
    the mean over all layers (0.469).

    The paper computes the scores at a stage from the hidden states in front of it, with the next
    layer's weights. Ours are the attention of the layer before, which has been computed already.
    """

    name: ClassVar[str] = "pyramiddrop"
    layers: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = self._chosen()
        if list(chosen) != sorted(set(chosen)) or any(layer < 1 for layer in chosen):
            raise SpecError(
                f"layers={self.layers!r} of 'pyramiddrop': give ascending layers from 1, such as "
                "'8,16,24'"
            )

    def _chosen(self) -> tuple[int, ...]:
        parts = self.layers.split(",") if self.layers else []
        if not all(part.strip().isdecimal() for part in parts):
            raise SpecError(
                f"layers={self.layers!r} of 'pyramiddrop' is not a list of layers such as '8,16,24'"
            )
        return tuple(int(part) for part in parts)

    def stage_layers(self, layers: int) -> tuple[int, ...]:
        if self.layers:
            return self._chosen()
        # The nearest layers, without layer 0, which has no attention to go by, and the end.
        quarters = {max(1, (2 * quarter * layers + 4) // 8) for quarter in (1, 2, 3)}
        return tuple(sorted(layer for layer in quarters if layer < max(2, layers)))

    def schedule(self, n: int, k: int, layers: int) -> TokenSchedule:
        """A geometric row from `n`, which ends in `k` or has it as its average."""
        if k >= n:
            return TokenSchedule(before=n, counted=n)
        stages = self.stage_layers(layers)
        if self.count == "final":
            share = (k / n) ** (1 / len(stages))
            kept = [round(n * share**i) for i in range(1, len(stages))] + [k]
        else:
            kept = self._averaging(n, k, layers, stages)
        return TokenSchedule(before=n, counted=k, stages=tuple(zip(stages, kept, strict=True)))

    def _averaging(self, n: int, k: int, layers: int, stages: tuple[int, ...]) -> list[int]:
        lengths = [end - at for at, end in zip(stages, (*stages[1:], layers), strict=True)]
        due = max(0, layers * k - stages[0] * n)
        low, high = 0.0, 1.0
        for _ in range(60):  # To the last bit of the share that meets the average.
            share = (low + high) / 2
            total = sum(part * n * share**i for i, part in enumerate(lengths, start=1))
            low, high = (share, high) if total < due else (low, share)
        kept = [round(n * high**i) for i in range(1, len(stages))]
        # The last stage makes up for what the others were rounded by.
        rest = due - sum(part * tokens for part, tokens in zip(lengths, kept, strict=False))
        last = min([n, *kept][-1], max(0, round(rest / lengths[-1])))
        return [*kept, last]
