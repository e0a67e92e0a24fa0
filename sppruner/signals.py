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
        """Called once per forward of the module, with what its attention function was given."""


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


_active: dict[int, Probe] = {}


def _implementation(base: str, module: nn.Module) -> Any:
    """The attention function called `base`; each model file has an eager one of its own."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return ALL_ATTENTION_FUNCTIONS[base]


def _probed(base: str) -> str:
    """The name of the attention function that probes around `base`; registered on first use."""
    name = base if base.startswith(_PREFIX) else _PREFIX + base
    if name in ALL_ATTENTION_FUNCTIONS:
        return name

    def attention(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        probe = _active.get(id(module))
        if probe is not None:
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            probe.read(query, key, mask, kwargs["scaling"])
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
