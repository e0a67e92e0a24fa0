"""Options that several methods share: the sources of saliency and of text relevance.

Methods inherit them, so that an option has one name, one check and one meaning.

Shapes: I planes that are selected together, N tokens of each plane.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor

from sppruner.errors import SpecError
from sppruner.selectors.base import Selector
from sppruner.selectors.saliency import SALIENCY
from sppruner.types import RelevancePool, RelevanceSource, VisualTokens


def check_choice(selector: Selector, option: str, allowed: Iterable[str]) -> None:
    """Raises SpecError unless the value of `option` is one of `allowed`."""
    value, names = getattr(selector, option), tuple(allowed)
    if value not in names:
        raise SpecError(f"{option}={value!r} of {selector.name!r}: use one of {names}")


def check_range(selector: Selector, options: Iterable[str], low: float, high: float) -> None:
    """Raises SpecError for the first of `options` whose value is outside [low, high]."""
    for option in options:
        value = getattr(selector, option)
        if not low <= value <= high:
            raise SpecError(
                f"{option}={value!r} of {selector.name!r} is outside [{low:g}, {high:g}]"
            )


@dataclass(frozen=True, kw_only=True)
class SaliencyOption(Selector):
    """The base of methods that rank tokens by saliency."""

    saliency: str = "attention"
    """The source of saliency, a key of `sppruner.selectors.saliency.SALIENCY`: "attention" is the
    family's signal, "cls" and "received" are one of the two, "feature" needs no attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "saliency", SALIENCY)

    @property
    def signals(self) -> frozenset[str]:
        return SALIENCY[self.saliency]


@dataclass(frozen=True, kw_only=True)
class RelevanceOptions(Selector):
    """The base of methods that score tokens against the instruction's text."""

    relevance: str = "embed"
    """The source of text relevance: "embed" (the language model's word embeddings), "clip" (CLIP's
    text tower, with the sign of `ClipText`) or "none"."""

    relevance_pool: str = "mean"
    """How the relevances to the words are pooled: "mean", "max" or "top3"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "relevance", get_args(RelevanceSource))
        check_choice(self, "relevance_pool", get_args(RelevancePool))

    @property
    def relevance_source(self) -> RelevanceSource:
        return cast(RelevanceSource, self.relevance)

    @property
    def relevance_pooling(self) -> RelevancePool:
        return cast(RelevancePool, self.relevance_pool)


def relevance_IN(images: Sequence[VisualTokens]) -> Tensor:
    """Text relevance [I, N] fp32; constant zeros for an image without relevance."""
    zeros_N = torch.zeros(images[0].count, device=images[0].features_ND.device)
    return torch.stack(
        [zeros_N if im.relevance_N is None else im.relevance_N.float() for im in images]
    )
