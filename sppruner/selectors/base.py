"""The base class of methods: options, the signals a method needs, and the selection of exactly k
tokens per plane.

A selector sees `VisualTokens` only, never the model. Options are the fields of its dataclass, so a
spec's options are checked when the selector is built, before the model runs.

Shapes: N tokens of a plane, K kept tokens.
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
from sppruner.spec import Budget
from sppruner.stages import TokenSchedule
from sppruner.types import RelevancePool, RelevanceSource, Selection, VisualTokens

# Most token pairs of one `_select` call, over all its images: many methods hold a matrix with 4
# bytes per pair, which this bounds to 256 MiB.
_PAIRS = 2**26
_MOST = 1e6  # of any numeric option


@dataclass(frozen=True, kw_only=True)
class Selector(ABC):
    """One method with its options. `select` is pure: equal tokens give an equal selection."""

    name: ClassVar[str]
    """The method's name in a spec."""

    def __post_init__(self) -> None:
        """Raises SpecError for an option with an invalid value."""
        for field in fields(self):
            value = getattr(self, field.name)
            # Squares and sums of larger ones are no numbers, which would be found out too late.
            if isinstance(value, int | float) and not -_MOST <= value <= _MOST:
                raise SpecError(
                    f"{field.name}={value!r} of {self.name!r}: give a number up to {_MOST:g}"
                )

    def resolve_for(self, can: Capabilities) -> Selector:
        """The method for a model with capabilities `can`: "auto" options get the family's
        values."""
        return self

    @property
    def signals(self) -> frozenset[str]:
        """Names of the signals that the method reads, see `sppruner.signals`."""
        return frozenset()

    @property
    def relevance_source(self) -> RelevanceSource:
        """Where text relevance comes from; "none" for a method that does not use it."""
        return "none"

    @property
    def relevance_pooling(self) -> RelevancePool:
        """How the relevances to the words of an instruction are pooled."""
        return "mean"

    def check(self, budget: Budget, can: Capabilities) -> None:
        """Raises SpecError for a budget that the method does not support on a model with
        capabilities `can`."""
        if budget.spread:
            raise SpecError(
                f"method {self.name!r} does not measure what an image holds: a budget with spread "
                "needs one that does, such as 'prunesid'"
            )

    def information(self, planes: Sequence[VisualTokens]) -> float:
        """Information of an image relative to the usual value, which is 1.0; for budgets with
        spread, so only for methods whose `check` accepts them."""
        raise SpecError(f"method {self.name!r} does not measure what an image holds")

    def schedule(self, n: int, k: int, layers: int) -> TokenSchedule:
        """Token counts by layer of an image of `n` tokens under a budget of `k`; `k` at all of them
        unless the method prunes inside the decoder."""
        return TokenSchedule(before=k, counted=k)

    @property
    def staged(self) -> bool:
        """Whether the method prunes inside the decoder."""
        return False

    def decoder_entry_bounds(self, n: int, k: int) -> tuple[int, int]:
        """Fewest and most of `n` tokens that enter a decoder of any depth under a budget of `k`, as
        bounds of `schedule`."""
        return k, k

    def select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        """Keeps `counts[i]` tokens of image i. A count of 0 keeps none, a count of N or more keeps
        all tokens unchanged; `_select` only gets the counts in between."""
        selections: list[Selection | None] = []
        for image, k in zip(images, counts, strict=True):
            keep_all = k >= image.count
            index_K = torch.arange(image.count if keep_all else 0, device=image.features_ND.device)
            selections.append(Selection(index_K=index_K) if keep_all or k <= 0 else None)
        # Images of one grid share a call, so that the method's small kernels run once.
        groups: dict[tuple[int, int], list[int]] = {}
        for i, selection in enumerate(selections):
            if selection is None:
                groups.setdefault(images[i].grid, []).append(i)
        for members in groups.values():
            per_call = max(1, _PAIRS // images[members[0]].count ** 2)
            for start in range(0, len(members), per_call):
                part = members[start : start + per_call]
                selected = self._select([images[i] for i in part], [counts[i] for i in part])
                for i, selection in zip(part, selected, strict=True):
                    selections[i] = selection
        return [selection for selection in selections if selection is not None]

    @abstractmethod
    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        """Keeps `counts[i]` tokens of image i, for images of one grid and counts 0 < k < N."""

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """Modelled FLOPs of selecting `kept` of `tokens` tokens with `width` features each."""
        return 0

    @classmethod
    def from_options(cls, options: dict[str, object]) -> Selector:
        """Builds the method from a spec's options. Raises SpecError for an unknown or invalid
        one."""
        known = {field.name: type(field.default) for field in fields(cls)}
        for option, value in options.items():
            if option not in known:
                names = ", ".join(sorted(known)) or "none"
                raise SpecError(f"method {cls.name!r} has no option {option!r}; it has {names}")
            expected = known[option]
            if expected is str and type(value) is int:
                # A command line's `layers=8` is a number to whoever parses it.
                options = options | {option: str(value)}
                continue
            numeric = expected is float and isinstance(value, int) and not isinstance(value, bool)
            if not numeric and type(value) is not expected:
                raise SpecError(
                    f"option {option}={value!r} of {cls.name!r} is not a {expected.__name__}"
                )
        return cls(**options)


def mask_to_index(mask_N: Tensor) -> Tensor:
    """Indices of the True entries, ascending."""
    return mask_N.nonzero().squeeze(1)
