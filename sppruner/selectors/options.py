"""Options that several methods share: where saliency comes from, where text relevance comes from.

A method that has them inherits them, so the options have one name, one check and one meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sppruner.errors import SpecError
from sppruner.selectors.base import SALIENCY, Selector
from sppruner.types import RelevancePool, RelevanceSource, VisualTokens


def one_of(selector: Selector, option: str, allowed: Iterable[str]) -> None:
    """Raises SpecError unless the option's value is one of `allowed`."""
    value, names = getattr(selector, option), tuple(allowed)
    if value not in names:
        raise SpecError(f"{option}={value!r} of {selector.name!r}: use one of {names}")


def within(selector: Selector, options: Iterable[str], low: float, high: float) -> None:
    """Raises SpecError for the first of `options` that is outside [low, high]."""
    for option in options:
        value = getattr(selector, option)
        if not low <= value <= high:
            raise SpecError(
                f"{option}={value!r} of {selector.name!r} is outside [{low:g}, {high:g}]"
            )


@dataclass(frozen=True, kw_only=True)
class SaliencyOption(Selector):
    """saliency: one of `sppruner.selectors.base.SALIENCY`; "attention" is the family's own."""

    saliency: str = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "saliency", SALIENCY)

    @property
    def signals(self) -> frozenset[str]:
        return SALIENCY[self.saliency]


@dataclass(frozen=True, kw_only=True)
class RelevanceOptions(Selector):
    """relevance: "embed" (the language model's own word embeddings), "clip" (CLIP's text tower,
    whose sign is `ClipText`'s) or "none". relevance_pool: how words are joined, "mean", "max" or
    "top3"."""

    relevance: str = "embed"
    relevance_pool: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "relevance", ("embed", "clip", "none"))
        one_of(self, "relevance_pool", ("mean", "max", "top3"))

    @property
    def relevance_source(self) -> RelevanceSource:
        return cast(RelevanceSource, self.relevance)

    @property
    def relevance_join(self) -> RelevancePool:
        return cast(RelevancePool, self.relevance_pool)


def relevance_IN(images: Sequence[VisualTokens]) -> Tensor:
    """Text relevance [I, N] fp32; zeros, which tell no token from another, where there is none."""
    blank_N = torch.zeros(images[0].count, device=images[0].features_ND.device)
    return torch.stack(
        [blank_N if im.relevance_N is None else im.relevance_N.float() for im in images]
    )
