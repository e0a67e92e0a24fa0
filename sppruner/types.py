"""The values that cross the library: visual tokens, selections and reports.

Shape suffixes used throughout the package: N visual tokens of one plane, K kept tokens, D width of
the language model, V width of the vision encoder, B batch rows, S sequence length, T text tokens,
I planes that go through a method together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sppruner.cost import ImageShape
from sppruner.errors import SpecError
from sppruner.spec import PruneSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VisualTokens:
    """One plane of one image as a selector sees it; never the model.

    A plane is a full rectangle of tokens: the whole image for most families, one tile or one
    resolution of it for families that cut images up. Row ends and other tokens that are not a
    piece of the image are not in it.

    features_ND: projected features, as the language model will read them.
    hidden_NV: the encoder states that the projector maps to the features one by one, or None where
        it does not work token by token.
    coords_N2: (row, column) of each token on the plane's grid, integer, in raster order.
    signals: what the method asked for, by name (`sppruner.signals`); attention is [N], keys [N, V].
    relevance_N: text relevance if the method asked for it and it could be computed, else None.
    row, image, plane: which prompt of the batch, which image within it, which plane of the image.
    """

    features_ND: Tensor
    hidden_NV: Tensor | None
    coords_N2: Tensor
    signals: Mapping[str, Tensor]
    relevance_N: Tensor | None = None
    row: int = 0
    image: int = 0
    plane: int = 0

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
    """What a selector returns: kept indices in raster order and, if it merges, new states.

    index_K: sorted, unique, int64. replace_KD: new features for the kept tokens, in the same order,
    or None. replace_KV: the same in the encoder's space, for methods that merge before the
    projector; at most one of the two is given. focus_K: True where the token was kept as a subject,
    for pictures; None if the method has no such notion.
    """

    index_K: Tensor
    replace_KD: Tensor | None = None
    replace_KV: Tensor | None = None
    focus_K: Tensor | None = None

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
    """Proof of what happened to one prompt, counted on the tensors the model was given.

    visual_tokens_kept: as the spec's budget counts them: tokens that enter the decoder, or, for a
    method that prunes inside it, what its budget speaks of (its docstring says which).
    kept_tokens: which tokens enter the decoder, those included that a method drops inside it: one
    bit for each of the prompt's `visual_tokens` in prompt order, image after image, as
    `numpy.packbits(…, bitorder="little")` packs them; a token that stands for several is marked
    at its own place.
    prompt_tokens: text and visual tokens that enter the decoder. layer_tokens: prompt tokens at
    each decoder layer, which differ only where a method prunes inside the decoder. image_shapes:
    what each image cost the encoder. selection_flops: modelled work of selecting before the decoder
    and, inside it, of scores that stages ask of layers which have not run (`DecoderCost.scoring`).
    """

    spec: PruneSpec
    visual_tokens: int
    visual_tokens_kept: int
    kept_tokens: bytes
    prompt_tokens: int
    prompt_tokens_dense: int
    layer_tokens: tuple[int, ...]
    image_shapes: tuple[ImageShape, ...] = ()
    selection_flops: int = 0
