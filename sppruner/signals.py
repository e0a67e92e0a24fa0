"""Attention signals without eager attention: a probe reads the few rows a method needs.

`transformers` picks the attention function by name. `probing` switches one sub-model to a name of
ours whose function hands every call to the implementation that was there and, for the one probed
module, also computes the wanted rows from the same queries and keys. Nothing else of the forward
changes, and the features stay bit-equal.
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

# Signals a selector may ask for, by name. ATTENTION is the family's own saliency: the row of the
# CLS token where the encoder has one, else the attention each token receives; the other two names
# ask for one of them in particular.
ATTENTION = "attention"
CLS_ATTENTION = "cls_attention"
RECEIVED_ATTENTION = "received_attention"
# Head-mean attention keys of each token, [N, V / heads]: a metric of what a token offers.
KEYS = "keys"
# A number that depends on the pixels alone: gives a random method its own draw for each image.
CONTENT_SEED = "content_seed"

_PREFIX = "sppruner_probe_"


def content_seed(pixels: Tensor) -> Tensor:
    """The CONTENT_SEED signal of one image's pixels."""
    return torch.tensor(zlib.crc32(pixels.float().cpu().numpy().tobytes()))


class Probe(Protocol):
    """Reads from the queries and keys of one attention module, on the way of a normal forward."""

    module: nn.Module

    def read(
        self, query_IHND: Tensor, key_IHND: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        """Called for each forward of the module with what its attention function was given: once,
        or, where a tower packs several images into one sequence, once per image in their order.

        Keys have fewer heads than queries where the module groups queries. mask: bool (True: may
        look), or additive, broadcastable to [I, H, N, N]; [I, N] of valid keys from flash
        attention; None where every query sees every key, or, in a decoder, every earlier one.
        """


class ClsRowProbe:
    """The head-mean attention row of the CLS query and the head-mean keys of one module.

    The row equals row 0 of the eager attention map without its CLS column (equation 1 of FSR,
    arXiv 2602.05809, up to normalisation): O(N · width) instead of a full map.
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
        """What was read of one image, by signal name."""
        assert self.rows_IN is not None, "no forward ran inside `probing`"
        assert self.keys_INV is not None
        row_N = self.rows_IN[image]
        return {ATTENTION: row_N, CLS_ATTENTION: row_N, KEYS: self.keys_INV[image]}


# Scores a received-attention probe holds at a time: 64 MiB in float32.
_SCORES_AT_A_TIME = 2**24


class ReceivedProbe:
    """The attention each token receives in one bidirectional module, for towers without a CLS
    token: the eager attention map's mean over heads and queries. And the head-mean keys.

    The map is made in chunks of queries and never held whole: O(N² · width) time, O(N) kept. Reads
    images in the order of the tower's calls, whether it stacks them or runs them one by one; a
    probe serves one encoding.
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
        """What was read of one image, by signal name."""
        assert self.received, "no forward ran inside `probing`"
        row_N = self.received[image]
        return {ATTENTION: row_N, RECEIVED_ATTENTION: row_N, KEYS: self.keys[image]}


def _additive(mask: Tensor, images: int, keys: int) -> Tensor:
    """A mask of any of the forms `Probe.read` names, to be added to scores [I, H, N, N]."""
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
    """The attention function called `base`; each model file has an eager one of its own."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return ALL_ATTENTION_FUNCTIONS[base]


def _images(query_IHND: Tensor, borders: Tensor | None) -> list[slice]:
    """The spans of a sequence that attend to themselves alone: towers that pack images into one
    sequence name the borders to flash attention, and call any other one span by span."""
    if borders is None:
        return [slice(0, query_IHND.shape[2])]
    return [slice(start, stop) for start, stop in pairwise(borders.tolist())]


def _probed(base: str) -> str:
    """The name of the attention function that probes around `base`; registered on first use."""
    name = base if base.startswith(_PREFIX) else _PREFIX + base
    if name in ALL_ATTENTION_FUNCTIONS:
        return name

    def attention(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        probe = _active.get(id(module))
        if probe is not None:
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            for part in _images(query, kwargs.get("cu_seq_lens_q")):
                probe.read(query[:, :, part], key[:, :, part], mask, kwargs["scaling"])
        return _implementation(base, module)(module, query, key, *args, **kwargs)

    AttentionInterface.register(name, attention)
    # Without a mask function of the same name transformers would build no mask at all.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


@contextmanager
def probing(submodel: Any, *probes: Probe) -> Iterator[None]:
    """Reads `probes` during forwards of `submodel` inside the block; restores everything after.

    Works on the sub-model's own config, so sub-models that are not probed keep their functions.
    """
    config = submodel.config
    before = config._attn_implementation_internal
    outer = {id(probe.module): _active.get(id(probe.module)) for probe in probes}
    config._attn_implementation_internal = _probed(config._attn_implementation)
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
