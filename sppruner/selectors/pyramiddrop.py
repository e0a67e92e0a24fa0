"""PyramidDrop (arXiv 2410.17247): each stage of the decoder keeps a share of the visual tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast, get_args

from sppruner.errors import SpecError
from sppruner.selectors.options import check_choice
from sppruner.selectors.staged import StagedSelector
from sppruner.stages import TokenSchedule
from sppruner.stages.plan import Scoring


@dataclass(frozen=True, kw_only=True)
class PyramidDropSelector(StagedSelector):
    """Each stage keeps the same share of the tokens that the previous stage kept, ranked by the
    attention of the last prompt token.

    The last prompt token is the one in front of the answer, so tokens are ranked for the answer's
    first token: on drawn scenes short answers hardly suffer and captions fail
    (`evaluation/RESULTS.md`).

    With count "final", the paper's share of 0.5 over three stages is a budget of 0.125; with
    "average" it is 0.469.

    As in the code, a stage keeps n · share^i tokens, rounded down. Unlike the code: the count after
    the last stage is the budget's, rounded as for every method; with count "average" the counts are
    rounded to the nearest, to meet the average; a stage ranks the tokens of all images of a prompt
    together, where the code supports one image. The code also renumbers the kept tokens from each
    stage's layer on: positions "renumber" of a spec does the same (not with M-RoPE), and "keep"
    leaves them at their positions.
    """

    name: ClassVar[str] = "pyramiddrop"

    layers: str = ""
    """The layers in front of which tokens are dropped, ascending from 1, such as "8,16,24"; empty
    for a quarter, half and three quarters of the depth, as in the paper."""

    scoring: str = "stage"
    """The scores that a stage ranks by. "stage", as in the paper and its code: the attention that
    the last token pays in the stage's layer to the hidden states that enter it, from that layer's
    input norm, query and key projections and rotary embeddings. "before": the attention it paid in
    the layer before, which needs no further projections but keeps other tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "scoring", get_args(Scoring))
        stages = self._parse_layers()
        if list(stages) != sorted(set(stages)) or any(layer < 1 for layer in stages):
            raise SpecError(
                f"layers={self.layers!r} of 'pyramiddrop': give ascending layers from 1, such as "
                "'8,16,24'"
            )

    def _parse_layers(self) -> tuple[int, ...]:
        parts = self.layers.split(",") if self.layers else []
        if not all(part.strip().isdecimal() for part in parts):
            raise SpecError(
                f"layers={self.layers!r} of 'pyramiddrop' is not a list of layers such as '8,16,24'"
            )
        return tuple(int(part) for part in parts)

    def stage_layers(self, layers: int) -> tuple[int, ...]:
        if self.layers:
            return self._parse_layers()
        # The nearest layers, except layer 0, before which no attention is known, and the end.
        quarters = {max(1, (2 * quarter * layers + 4) // 8) for quarter in (1, 2, 3)}
        return tuple(sorted(layer for layer in quarters if layer < max(2, layers)))

    def schedule(self, n: int, k: int, layers: int) -> TokenSchedule:
        """A geometric sequence of counts from `n` that ends at `k` or averages `k`."""
        if k >= n:
            return TokenSchedule(before=n, counted=n)
        stages = self.stage_layers(layers)
        if self.count == "final":
            share = (k / n) ** (1 / len(stages))
            # Rounding errors may put a whole number slightly below itself.
            kept = [math.floor(n * share**i + 1e-9) for i in range(1, len(stages))] + [k]
        else:
            kept = self._counts_for_average(n, k, layers, stages)
        return TokenSchedule(
            before=n,
            counted=k,
            stages=tuple(zip(stages, kept, strict=True)),
            scoring=cast(Scoring, self.scoring),
        )

    def _counts_for_average(
        self, n: int, k: int, layers: int, stages: tuple[int, ...]
    ) -> list[int]:
        """Counts after each stage whose mean over all layers is `k`, as nearly as whole tokens
        can."""
        lengths = [end - start for start, end in zip(stages, (*stages[1:], layers), strict=True)]
        target = max(0, layers * k - stages[0] * n)
        low, high = 0.0, 1.0
        for _ in range(60):  # bisects to the last bit of the share
            share = (low + high) / 2
            total = sum(length * n * share**i for i, length in enumerate(lengths, start=1))
            low, high = (share, high) if total < target else (low, share)
        kept = [round(n * high**i) for i in range(1, len(stages))]
        # The last stage compensates for the rounding of the others.
        rest = target - sum(length * tokens for length, tokens in zip(lengths, kept, strict=False))
        last = min([n, *kept][-1], max(0, round(rest / lengths[-1])))
        return [*kept, last]
