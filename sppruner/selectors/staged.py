"""The base of methods that prune only inside the decoder: all tokens enter it, and `StageDriver`
drops some at each stage."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sppruner.capabilities import Capabilities
from sppruner.errors import MissingSignal, SpecError
from sppruner.selectors.base import Selector
from sppruner.selectors.options import check_choice
from sppruner.spec import Budget
from sppruner.types import Selection, VisualTokens

COUNTS = ("final", "average")


def check_stages(method: str, layers: Sequence[int], can: Capabilities) -> None:
    """Raises MissingSignal if the model's decoder supports no stages, SpecError if it supports none
    in front of one of `layers`."""
    first, end = can.first_prunable_layer, can.decoder_layers
    if first is None:
        raise MissingSignal(
            f"method {method!r} prunes inside the decoder, which {can} does not allow: use one "
            "that prunes before it, such as 'sppruner'"
        )
    invalid = [layer for layer in layers if not first <= layer < end]
    if invalid:
        raise SpecError(
            f"method {method!r} would prune in front of decoder layer {invalid[0]}; {can.family} "
            f"with {end} layers allows layers {first} to {end - 1}"
        )


@dataclass(frozen=True, kw_only=True)
class StagedSelector(Selector):
    """A method whose stages drop tokens inside the decoder."""

    count: str = "final"
    """What the budget counts: "final", the tokens after the last stage, or "average", the mean over
    the decoder's layers, to the nearest token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "count", COUNTS)

    @abstractmethod
    def stage_layers(self, layers: int) -> tuple[int, ...]:
        """The layers in front of which tokens are dropped, for a decoder of `layers` layers."""

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
        """All tokens: the scores that decide are only known inside the decoder."""
        return [
            Selection(index_K=torch.arange(image.count, device=image.features_ND.device))
            for image in images
        ]
