"""FastV (arXiv 2403.06764): after the decoder's second layer, the tokens it attends to least go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sppruner.errors import SpecError
from sppruner.selectors.staged import StagedSelector
from sppruner.stages import TokenSchedule


@dataclass(frozen=True, kw_only=True)
class FastVSelector(StagedSelector):
    """Keeps the tokens with the most attention from the last prompt token, mean over heads.

    Options: layer: in front of which tokens are dropped, by the attention of the one before it
    (K = 2 in the paper). count: the budget is what stays after it (the paper's own ratio,
    1 − R), or with "average" the mean over all layers, as comparisons at 192, 128 and 64 tokens
    count.

    The paper describes the attention a token receives on average; its code, which others follow,
    takes the row of the last token in the layer before, which has run, and so does this. As in the
    code, the tokens that are left keep their positions unless the spec renumbers them.
    """

    name: ClassVar[str] = "fastv"
    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise SpecError(
                f"layer={self.layer} of 'fastv': there is no attention to go by in front of layer "
                "0, use 1 or more"
            )

    def stage_layers(self, layers: int) -> tuple[int, ...]:
        return (self.layer,)

    def schedule(self, n: int, k: int, layers: int) -> TokenSchedule:
        """All `n` up to `layer`. Then `k`, or what makes `k` the average."""
        if k >= n:
            return TokenSchedule(before=n, counted=n)
        kept = k
        if self.count == "average":
            kept = max(0, round((layers * k - self.layer * n) / (layers - self.layer)))
        return TokenSchedule(before=n, counted=k, stages=((self.layer, kept),))
