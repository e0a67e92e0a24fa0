"""What a method is: options, the signals it needs, and a choice of exactly k tokens per image.

A selector sees `VisualTokens` only. Options are the fields of its dataclass, so a spec's options
are checked when the selector is built, before anything runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from sppruner.capabilities import Capabilities
from sppruner.errors import SpecError
from sppruner.selectors.similarity import encoder_states
from sppruner.signals import ATTENTION, CLS_ATTENTION, RECEIVED_ATTENTION
from sppruner.spec import Budget
from sppruner.stages import TokenSchedule
from sppruner.types import RelevancePool, RelevanceSource, Selection, VisualTokens

# Pairs of tokens that go through a method at once, over all its images: many methods hold a
# matrix of them, and at 4 bytes each this one takes 256 MiB.
_PAIRS = 2**26


@dataclass(frozen=True, kw_only=True)
class Selector(ABC):
    """One method with its options. `select` is pure: same tokens, same choice.

    signals: signals to read. relevance_source: where text relevance comes from ("none": not
    wanted). relevance_join: how the words of an instruction are joined.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:  # noqa: B027 - a method need not check anything
        """Raises SpecError for an option's value that cannot mean anything."""

    def on(self, can: Capabilities) -> Selector:
        """The method as it runs on a model that can do `can`: with what its options leave to the
        family filled in."""
        return self

    @property
    def signals(self) -> frozenset[str]:
        return frozenset()

    @property
    def relevance_source(self) -> RelevanceSource:
        return "none"

    @property
    def relevance_join(self) -> RelevancePool:
        return "mean"

    def check(self, budget: Budget, can: Capabilities) -> None:
        """Raises SpecError for a budget this method cannot run on a model that can do `can`."""
        if budget.spread:
            raise SpecError(
                f"method {self.name!r} does not measure what an image holds: a budget with spread "
                "needs one that does, such as 'prunesid'"
            )

    def information(self, planes: Sequence[VisualTokens]) -> float:
        """How much an image holds over what an image usually holds (1.0); for budgets with
        spread, so only for methods whose `check` lets them pass."""
        raise SpecError(f"method {self.name!r} does not measure what an image holds")

    def schedule(self, n: int, k: int, layers: int) -> TokenSchedule:
        """Where the budget of `k` of an image's `n` tokens is spent; in front of the decoder
        unless the method prunes inside it."""
        return TokenSchedule(before=k, counted=k)

    @property
    def staged(self) -> bool:
        """Whether it prunes inside the decoder."""
        return False

    def decoder_entry_bounds(self, n: int, k: int) -> tuple[int, int]:
        """Fewest and most of `n` tokens that `schedule` lets enter a decoder, whatever its depth,
        for a budget of `k`."""
        return k, k

    def select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        """Keeps `counts[i]` tokens of image i. A count of 0 keeps nothing, a count of at least N
        keeps every token untouched; the method itself only sees the counts in between."""
        chosen: list[Selection | None] = []
        for image, k in zip(images, counts, strict=True):
            whole = k >= image.count
            kept = torch.arange(image.count if whole else 0, device=image.features_ND.device)
            chosen.append(Selection(index_K=kept) if whole or k <= 0 else None)
        # Images of one grid go through the method together: its small kernels then run once.
        groups: dict[tuple[int, int], list[int]] = {}
        for i, done in enumerate(chosen):
            if done is None:
                groups.setdefault(images[i].grid, []).append(i)
        for members in groups.values():
            together = max(1, _PAIRS // images[members[0]].count ** 2)
            for start in range(0, len(members), together):
                part = members[start : start + together]
                picked = self._select([images[i] for i in part], [counts[i] for i in part])
                for i, selection in zip(part, picked, strict=True):
                    chosen[i] = selection
        return [selection for selection in chosen if selection is not None]

    @abstractmethod
    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        """The method itself, for images of one grid with 0 < k < N each."""

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """Modelled work of selecting `kept` of `tokens` with `width` features."""
        return 0

    @classmethod
    def from_options(cls, options: dict[str, object]) -> Selector:
        """Builds the method from a spec's options. Raises SpecError for an unknown or bad one."""
        known = {field.name: type(field.default) for field in fields(cls)}
        for option, value in options.items():
            if option not in known:
                names = ", ".join(sorted(known)) or "none"
                raise SpecError(f"method {cls.name!r} has no option {option!r}; it has {names}")
            expected = known[option]
            numeric = expected is float and isinstance(value, int) and not isinstance(value, bool)
            if not numeric and type(value) is not expected:
                raise SpecError(
                    f"option {option}={value!r} of {cls.name!r} is not a {expected.__name__}"
                )
        return cls(**options)


def from_mask(mask_N: Tensor) -> Tensor:
    """Indices of the True entries, in raster order."""
    return mask_N.nonzero().squeeze(1)


def min_max_IN(values_IN: Tensor) -> Tensor:
    """Each image's values scaled to [0, 1]; constant values become 0."""
    low_I1 = values_IN.amin(dim=1, keepdim=True)
    span_I1 = values_IN.amax(dim=1, keepdim=True) - low_I1
    return (values_IN - low_I1) / span_I1.clamp(min=1e-12)


def feature_saliency_IN(images: Sequence[VisualTokens]) -> Tensor:
    """Saliency without attention: distance of a token from the image's mean, 3×3 mean-filtered."""
    maps = []
    for image in images:
        states_NV = encoder_states(image).float()
        mean_1V = states_NV.mean(dim=0, keepdim=True)
        distance_N = 1 - torch.nn.functional.cosine_similarity(states_NV, mean_1V, dim=1)
        rows, columns = image.grid
        grid = distance_N.new_zeros(rows, columns)
        held = distance_N.new_zeros(rows, columns)
        row_N, column_N = image.coords_N2.unbind(dim=1)
        grid[row_N, column_N] = distance_N
        held[row_N, column_N] = 1.0
        summed = torch.nn.functional.avg_pool2d(grid[None, None], 3, 1, 1, divisor_override=1)
        neighbours = torch.nn.functional.avg_pool2d(held[None, None], 3, 1, 1, divisor_override=1)
        maps.append((summed / neighbours.clamp(min=1))[0, 0][row_N, column_N])
    return torch.stack(maps)


# What a method's `saliency` option may say, and the signal each needs.
SALIENCY: dict[str, frozenset[str]] = {
    "attention": frozenset({ATTENTION}),
    "cls": frozenset({CLS_ATTENTION}),
    "received": frozenset({RECEIVED_ATTENTION}),
    "feature": frozenset(),
}


def saliency_IN(images: Sequence[VisualTokens], source: str) -> Tensor:
    """Saliency [I, N] by an entry of `SALIENCY`: "attention" is the family's own (the row of the
    CLS token where there is one, else received attention), "feature" needs no attention."""
    if source == "feature":
        return feature_saliency_IN(images)
    (signal,) = SALIENCY[source]
    return torch.stack([image.signals[signal].float() for image in images])
