"""Attention signals without eager attention: a probe reads the few rows a method needs.

`transformers` picks the attention function by name. `probing` switches one sub-model to a name of
ours whose function hands every call to the implementation that was there and, for the one probed
module, also computes the wanted rows from the same queries and keys. Nothing else of the forward
changes, and the features stay bit-equal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Signals a selector may ask for, by name.
CLS_ATTENTION = "cls_attention"
# A number that depends on the pixels alone: gives a random method its own draw for each image.
CONTENT_SEED = "content_seed"

_PREFIX = "sppruner_probe_"


class ClsRowProbe:
    """Collects the head-mean attention row of the CLS query, [images, N], of one module.

    Equals row 0 of the eager attention map without its CLS column (equation 1 of FSR,
    arXiv 2602.05809, up to normalisation): O(N · width) instead of a full map.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.rows_IN: Tensor | None = None

    def read(self, query_IHND: Tensor, key_IHND: Tensor, scaling: float) -> None:
        scores_IHN = torch.einsum("ihd,ihnd->ihn", query_IHND[:, :, 0].float(), key_IHND.float())
        rows_IHN = torch.softmax(scores_IHN * scaling, dim=-1)
        self.rows_IN = rows_IHN.mean(dim=1)[:, 1:]


_active: dict[int, ClsRowProbe] = {}


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
            probe.read(query, key, kwargs["scaling"])
        return _implementation(base, module)(module, query, key, *args, **kwargs)

    AttentionInterface.register(name, attention)
    # Without a mask function of the same name transformers would build no mask at all.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


@contextmanager
def probing(submodel: Any, probe: ClsRowProbe) -> Iterator[ClsRowProbe]:
    """Reads `probe` during forwards of `submodel` inside the block; restores everything after.

    Works on the sub-model's own config, so sub-models that are not probed keep their functions.
    """
    config = submodel.config
    before, module = config._attn_implementation_internal, id(probe.module)
    probed = _probed(config._attn_implementation)
    outer = _active.get(module)
    _active[module] = probe
    config._attn_implementation_internal = probed
    try:
        yield probe
    finally:
        config._attn_implementation_internal = before
        if outer is None:
            del _active[module]
        else:
            _active[module] = outer
