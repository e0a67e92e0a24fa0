"""The values that packages of the library exchange: visual tokens, selections and reports.

Shapes, here and throughout the package: N visual tokens of one plane, K kept tokens, D width of the
language model, V width of the vision encoder, B batch rows, S sequence length, T text tokens, I
planes that go through a method together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sppruner.cost import ImageShape
from sppruner.errors import SpecError
from sppruner.spec import PruneSpec

RelevanceSource: TypeAlias = Literal["none", "embed", "clip"]
"""Where text relevance comes from; "none" is no text relevance."""

RelevancePool: TypeAlias = Literal["mean", "max", "top3"]
"""How the scores of an instruction's words are pooled into one per visual token."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VisualTokens:
    """One plane of one image as a selector sees it; never the model.

    A plane is a full rectangle of tokens: the whole image for most families; one tile or one
    resolution of it for families that cut images into tiles. Row ends and other tokens that show no
    part of the image belong to no plane.
    """

    features_ND: Tensor
    """Projected features, as the language model reads them."""

    hidden_NV: Tensor | None
    """Encoder states that the projector maps to the features one by one; None where it does not
    work token by token."""

    coords_N2: Tensor
    """Integer (row, column) of each token on the plane's grid, in raster order."""

    signals: Mapping[str, Tensor]
    """The signals that the method needs, by name (`sppruner.signals`); attention is [N], keys
    [N, V]."""

    relevance_N: Tensor | None = None
    """Text relevance; None if the method does not use it or it could not be computed."""

    row: int = 0
    """Index of the prompt in the batch."""

    image: int = 0
    """Index of the image in the prompt."""

    plane: int = 0
    """Index of the plane in the image."""

    @property
    def count(self) -> int:
        return int(self.features_ND.shape[0])

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) spanned by the coordinates."""
        if self.count == 0:
            return 0, 0
        last = self.coords_N2.max(dim=0).values + 1
        return int(last[0]), int(last[1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """What a selector returns for one plane."""

    index_K: Tensor
    """Kept tokens: int64 indices, unique and in raster order."""

    replace_KD: Tensor | None = None
    """New features of the kept tokens, in the same order; None where they stay as they are."""

    replace_KV: Tensor | None = None
    """New encoder states of the kept tokens, for methods that merge before the projector; set at
    most one of this and `replace_KD`."""

    focus_K: Tensor | None = None
    """bool, True for tokens that are kept as a subject, for pictures; None if the method does not
    distinguish them."""

    def __post_init__(self) -> None:
        if self.index_K.dtype != torch.int64:
            raise SpecError(f"selection indices are {self.index_K.dtype}, not int64")
        if self.replace_KD is not None and self.replace_KV is not None:
            raise SpecError("a selection replaces features or encoder states, not both")

    @property
    def count(self) -> int:
        return int(self.index_K.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """Proof of what was pruned of one prompt, counted on the tensors that the model reads."""

    spec: PruneSpec
    """The prompt's spec."""

    visual_tokens: int
    """Visual tokens of the unpruned prompt."""

    visual_tokens_kept: int
    """Visual tokens as the spec's budget counts them: those that enter the decoder or, for a method
    that prunes inside it, the count that its docstring names."""

    kept_tokens: bytes
    """Which visual tokens enter the decoder, those included that a method drops inside it: one bit
    for each of `visual_tokens` in prompt order, image after image, packed as by
    `numpy.packbits(…, bitorder="little")`. A token that stands for several is marked at its own
    index."""

    prompt_tokens: int
    """Text and visual tokens that enter the decoder."""

    prompt_tokens_dense: int
    """Text and visual tokens of the unpruned prompt."""

    layer_tokens: tuple[int, ...]
    """Prompt tokens at each decoder layer; they differ only where a method prunes inside it."""

    image_shapes: tuple[ImageShape, ...] = ()
    """The encoder input of each image, for the cost model."""

    selection_flops: int = 0
    """Modelled FLOPs of selecting before the decoder and, inside it, of the scores that stages
    compute with layers that have not run (`DecoderCost.scoring`)."""
