"""Methods that prune inside the decoder only: every token enters it, `StageDriver` drops some."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sppruner.capabilities import Capabilities
from sppruner.errors import MissingSignal, SpecError
from sppruner.selectors.base import Selector
from sppruner.spec import Budget
from sppruner.types import Selection, VisualTokens

COUNTS = ("final", "average")


def check_stages(method: str, layers: Sequence[int], can: Capabilities) -> None:
    """Raises MissingSignal where a decoder cannot be pruned inside, SpecError where it cannot be
    pruned in front of `layers`."""
    first, end = can.first_prunable_layer, can.decoder_layers
    if first is None:
        raise MissingSignal(
            f"method {method!r} prunes inside the decoder, which {can} does not allow: use one "
            "that prunes before it, such as 'sppruner'"
        )
    wrong = [layer for layer in layers if not first <= layer < end]
    if wrong:
        raise SpecError(
            f"method {method!r} would prune in front of decoder layer {wrong[0]}; {can.family} "
            f"with {end} layers allows layers {first} to {end - 1}"
        )


@dataclass(frozen=True, kw_only=True)
class StagedSelector(Selector):
    """Options: count: what the budget speaks of, "final": the tokens after the last stage, or
    "average": the mean over the decoder's layers, to the nearest token."""

    count: str = "final"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count not in COUNTS:
            raise SpecError(f"count={self.count!r} of {self.name!r}: use 'final' or 'average'")

    @abstractmethod
    def stage_layers(self, layers: int) -> tuple[int, ...]:
        """The layers in front of which tokens are dropped, of a decoder with so many."""

    def check(self, budget: Budget, can: Capabilities) -> None:
        super().check(budget, can)
        check_stages(self.name, self.stage_layers(can.decoder_layers), can)
        if self.count == "final":
            return
        if budget.ratio is None:
            raise SpecError(
                f"method {self.name!r} with count='average' needs a budget ratio: how few tokens "
                "it can reach on average depends on the image's size"
            )
        first = self.stage_layers(can.decoder_layers)[0]
        least = first / can.decoder_layers
        if budget.ratio < least:
            raise SpecError(
                f"method {self.name!r} cannot keep {budget.ratio:.3g} of the tokens on average: "
                f"all of them pass {first} of {can.decoder_layers} layers. Use a ratio of at "
                f"least {least:.3g}, an earlier layer, or count='final'"
            )

    @property
    def staged(self) -> bool:
        return True

    def decoder_entry_bounds(self, n: int, k: int) -> tuple[int, int]:
        return n, n

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        """Everything: what to drop is not known before the decoder."""
        return [
            Selection(index_K=torch.arange(image.count, device=image.features_ND.device))
            for image in images
        ]
