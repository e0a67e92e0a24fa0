"""PyramidDrop (arXiv 2410.17247): fewer tokens from stage to stage of the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

from sppruner.errors import SpecError
from sppruner.selectors.staged import StagedSelector
from sppruner.stages import TokenSchedule
from sppruner.stages.plan import Scoring


@dataclass(frozen=True, kw_only=True)
class PyramidDropSelector(StagedSelector):
    """Each stage keeps the same share of what the one before left, by the attention of the last
    prompt token.

    Options: layers: in front of which tokens are dropped, such as "8,16,24"; left empty, at a
    quarter, half and three quarters of the depth, as the paper does. count: the budget is what
    stays after the last stage (the paper's share of 0.5 is a budget of 0.125), or with "average"
    the mean over all layers (0.469).

    scoring: what a stage ranks by. "stage", the paper's and its code's: the attention that the
    last token would pay in the stage's own layer to the hidden states in front of it, with that
    layer's input norm, query and key projections and rotary embeddings. "before": the attention it
    has paid in the layer before, which costs nothing but chooses other tokens.

    As in the code, a stage keeps n · share^i tokens cut to a whole number. Not as in the code: what
    stays after the last stage is the budget's own count, rounded as every method's is; with count
    "average" the counts are rounded to the nearest, to meet the average; a stage ranks the tokens
    of all images of a prompt together, where the code knows one image. The code also renumbers the
    tokens that are left, from each stage's layer on: a spec's positions "renumber" does that (not
    with M-RoPE); "keep" leaves them where they were.
    """

    name: ClassVar[str] = "pyramiddrop"
    layers: str = ""
    scoring: str = "stage"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scoring not in ("stage", "before"):
            raise SpecError(f"scoring={self.scoring!r} of 'pyramiddrop': use 'stage' or 'before'")
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
            # A whole number may come out as a little less.
            kept = [math.floor(n * share**i + 1e-9) for i in range(1, len(stages))] + [k]
        else:
            kept = self._averaging(n, k, layers, stages)
        return TokenSchedule(
            before=n,
            counted=k,
            stages=tuple(zip(stages, kept, strict=True)),
            scoring=cast(Scoring, self.scoring),
        )

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
