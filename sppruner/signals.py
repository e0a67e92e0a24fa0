"""Attention signals without eager attention: probes compute the few rows that methods need.

`transformers` looks attention functions up by name. `probing` switches one sub-model to a
registered function that forwards every call to the previous implementation and, for the probed
modules, also computes the signals from the same queries and keys. Nothing else in the forward
changes, and the features stay bit-equal.

Shapes: I images (or tiles), H heads, N tokens of an image, D width of a head, V width of the keys'
mean over heads.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Names of the signals that a selector may read.
ATTENTION = "attention"
"""The family's saliency: CLS_ATTENTION if the encoder has a CLS token, else RECEIVED_ATTENTION."""
CLS_ATTENTION = "cls_attention"
"""The head-mean attention row of the CLS token, [N]."""
RECEIVED_ATTENTION = "received_attention"
"""The attention that each token receives, mean over heads and queries, [N]."""
KEYS = "keys"
"""Head-mean attention keys of each token, [N, V], to compare tokens by."""
CONTENT_SEED = "content_seed"
"""A number that depends only on the pixels, so that a random method draws per image."""

_PREFIX = "sppruner_probe_"


def content_seed(pixels: Tensor) -> Tensor:
    """The CONTENT_SEED signal of one image's pixels."""
    return torch.tensor(zlib.crc32(pixels.float().cpu().numpy().tobytes()))


class Probe(Protocol):
    """Reads signals from the queries and keys of one attention module during a normal forward."""

    module: nn.Module
    """The attention module that is probed."""

    def read(
        self, query_IHND: Tensor, key_IHND: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        """Called on each forward of the module with its attention function's arguments: once or, if
        a tower packs several images into one sequence, once per image in their order.

        Keys have fewer heads than queries with grouped-query attention. mask: bool (True: attends)
        or additive, broadcastable to [I, H, N, N]; [I, N] of valid keys from flash attention; None
        if every query attends to every key or, in a decoder, to every earlier one.
        """


class ClsRowProbe:
    """The head-mean attention row of the CLS query, and the head-mean keys, of one module.

    The row equals row 0 of the eager attention map without its CLS column (equation 1 of FSR,
    arXiv 2602.05809, up to normalisation), in O(N · width) instead of a full map.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.rows_IN: Tensor | None = None
        self.keys_INV: Tensor | None = None

    def read(
        self, query_IHND: Tensor, key_IHND: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        scores_IHN = torch.einsum("ihd,ihnd->ihn", query_IHND[:, :, 0].float(), key_IHND.float())
        rows_IHN = torch.softmax(scores_IHN * scaling, dim=-1)
        self.rows_IN = rows_IHN.mean(dim=1)[:, 1:]
        self.keys_INV = key_IHND[:, :, 1:].float().mean(dim=1)

    def signals(self, image: int) -> dict[str, Tensor]:
        """The signals of one image, by name."""
        assert self.rows_IN is not None, "no forward ran inside `probing`"
        assert self.keys_INV is not None
        row_N = self.rows_IN[image]
        return {ATTENTION: row_N, CLS_ATTENTION: row_N, KEYS: self.keys_INV[image]}


# Most scores that a received-attention probe holds at once: 64 MiB in float32.
_SCORES_AT_A_TIME = 2**24


class ReceivedProbe:
    """The attention that each token receives in one bidirectional module (the eager attention map's
    mean over heads and queries), and the head-mean keys, for towers without a CLS token.

    The map is computed in chunks of queries and never held whole: O(N² · width) time, O(N) memory.
    Images are read in the order of the tower's calls, stacked or one by one; a probe serves one
    encoding.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.received: list[Tensor] = []
        self.keys: list[Tensor] = []

    def read(
        self, query_IHND: Tensor, key_IHND: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        images, heads, queries, width = query_IHND.shape
        groups = key_IHND.shape[1]
        # [I, groups, queries of a group, N, D] against [I, groups, 1, D, N].
        query = query_IHND.float().reshape(images, groups, heads // groups, queries, width)
        key = key_IHND.float().transpose(-1, -2).unsqueeze(2)
        bias = None if mask is None else _additive(mask, images, key.shape[-1])
        total_IN = query.new_zeros(images, key.shape[-1])
        chunk = max(1, _SCORES_AT_A_TIME // (images * heads * key.shape[-1]))
        for start in range(0, queries, chunk):
            rows = slice(start, start + chunk)
            scores = (query[..., rows, :] @ key).flatten(1, 2) * scaling
            if bias is not None:
                scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, rows])
            total_IN += torch.softmax(scores, dim=-1).sum(dim=(1, 2))
        self.received += (total_IN / (heads * queries)).unbind()
        self.keys += key_IHND.float().mean(dim=1).unbind()

    def signals(self, image: int) -> dict[str, Tensor]:
        """The signals of one image, by name."""
        assert self.received, "no forward ran inside `probing`"
        row_N = self.received[image]
        return {ATTENTION: row_N, RECEIVED_ATTENTION: row_N, KEYS: self.keys[image]}


def _additive(mask: Tensor, images: int, keys: int) -> Tensor:
    """A mask in any form of `Probe.read`, as one that is added to scores [I, H, N, N]."""
    if mask.dim() == 2:
        mask = mask.bool()[:, None, None]
    mask = mask[..., :keys].expand(images, -1, -1, -1)
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(
        ~mask, torch.finfo(torch.float32).min
    )


_active: dict[int, Probe] = {}


def _implementation(base: str, module: nn.Module) -> Any:
    """The attention function named `base`; each model file defines its own eager one."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return ALL_ATTENTION_FUNCTIONS[base]


def _image_spans(query_IHND: Tensor, borders: Tensor | None) -> list[slice]:
    """The spans of a sequence that attend only within themselves. Towers that pack images into one
    sequence pass the borders to flash attention, and call any other attention once per span."""
    if borders is None:
        return [slice(0, query_IHND.shape[2])]
    return [slice(start, stop) for start, stop in pairwise(borders.tolist())]


def _register_probing(base: str) -> str:
    """The name of the function that probes and then calls `base`; registers it on first use."""
    name = base if base.startswith(_PREFIX) else _PREFIX + base
    if name in ALL_ATTENTION_FUNCTIONS:
        return name

    def attention(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        probe = _active.get(id(module))
        if probe is not None:
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            for span in _image_spans(query, kwargs.get("cu_seq_lens_q")):
                probe.read(query[:, :, span], key[:, :, span], mask, kwargs["scaling"])
        return _implementation(base, module)(module, query, key, *args, **kwargs)

    AttentionInterface.register(name, attention)
    # transformers builds no mask without a mask function of the same name.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


@contextmanager
def probing(submodel: Any, *probes: Probe) -> Iterator[None]:
    """Runs `probes` during forwards of `submodel` inside the block; restores everything on exit.

    Changes only the sub-model's config, so other sub-models keep their attention functions.
    """
    config = submodel.config
    before = config._attn_implementation_internal
    outer = {id(probe.module): _active.get(id(probe.module)) for probe in probes}
    config._attn_implementation_internal = _register_probing(config._attn_implementation)
    _active.update({id(probe.module): probe for probe in probes})
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        for module, probe in outer.items():
            if probe is None:
                del _active[module]
            else:
                _active[module] = probe
