"""FastV (arXiv 2403.06764): after the decoder's second layer, the least attended tokens are
dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sppruner.errors import SpecError
from sppruner.selectors.staged import StagedSelector
from sppruner.stages import TokenSchedule


@dataclass(frozen=True, kw_only=True)
class FastVSelector(StagedSelector):
    """Keeps the tokens with the most attention from the last prompt token, mean over heads.

    The paper describes the mean attention that a token receives; its code, and the codes that
    follow it, take the row of the last token in the layer before the stage, which has run. So does
    this. As in the code, kept tokens keep their positions unless the spec renumbers them.

    With count "final" the budget is the paper's ratio 1 − R; "average" is how comparisons at 192,
    128 and 64 tokens count.
    """

    name: ClassVar[str] = "fastv"

    layer: int = 2
    """The layer in front of which tokens are dropped, from 1, by the attention of the layer before
    it (the paper's K = 2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise SpecError(
                f"layer={self.layer} of 'fastv': no attention precedes layer 0, use 1 or more"
            )

    def stage_layers(self, layers: int) -> tuple[int, ...]:
        return (self.layer,)

    def schedule(self, n: int, k: int, layers: int) -> TokenSchedule:
        """All `n` tokens up to `layer`; then `k`, or the count that makes the average `k`."""
        if k >= n:
            return TokenSchedule(before=n, counted=n)
        kept = k
        if self.count == "average":
            kept = max(0, round((layers * k - self.layer * n) / (layers - self.layer)))
        return TokenSchedule(before=n, counted=k, stages=((self.layer, kept),))
