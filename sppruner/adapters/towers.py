"""Vision towers of unmodified models with less work, on the same data by the same kernels: on a CPU
the features stay bit-equal.

Towers that pack windows and images into one sequence call attention once per span; here consecutive
spans of one length share a call. Layers after the hidden state that is read do not run.

Shapes: P patches of a packed sequence, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_SDPA: Final = "sdpa"
# Towers pass the whole sequence, with the spans' borders, only to an attention named "…flash…".
_SPANS: Final = "sppruner_flash_spans"


def _attend_within_spans(
    module: nn.Module,
    query_1HPD: Tensor,
    key_1HPD: Tensor,
    value_1HPD: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[1, P, H, D] attention of a packed sequence whose spans attend only within themselves.

    Consecutive spans of one length go to SDPA as one batch of views. Spans of one length that are
    not adjacent would have to be copied, which costs more on a CPU than the calls it saves.
    """
    groups = [(n, len(list(spans))) for n, spans in groupby(cu_seq_lens_q.diff().tolist())]
    sizes = [length * count for length, count in groups]
    parts = zip(
        *(torch.split(x[0], sizes, dim=1) for x in (query_1HPD, key_1HPD, value_1HPD)), strict=True
    )
    outputs = []
    for (length, count), part in zip(groups, parts, strict=True):
        query, key, value = (
            x_HPD.view(-1, count, length, x_HPD.shape[-1]).transpose(0, 1) for x_HPD in part
        )
        output, _ = ALL_ATTENTION_FUNCTIONS[_SDPA](
            module, query, key, value, attention_mask, **kwargs
        )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


AttentionInterface.register(_SPANS, _attend_within_spans)
AttentionMaskInterface.register(_SPANS, ALL_MASK_ATTENTION_FUNCTIONS[_SDPA])


@contextmanager
def batched_span_attention(tower: Any) -> Iterator[None]:
    """Inside the block, a tower that packs images into one sequence computes the attention of
    consecutive spans of one length in one call. A tower with another attention than SDPA keeps
    it."""
    config = tower.config
    before = config._attn_implementation_internal
    if config._attn_implementation == _SDPA:
        config._attn_implementation_internal = _SPANS
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def _pass_through(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


@contextmanager
def skipping_layers_after(layers: nn.ModuleList, index: int) -> Iterator[None]:
    """Inside the block, layers after hidden state `index` (0 is the embeddings, −1 the last) return
    their input unchanged, so that all later states of the tower equal that state.

    The layers stay in the tower and only their `forward` is overridden: transformers installs its
    recorders of hidden states on a tower's first forward, for all layers and for good.
    """
    skipped = list(layers)[index if index >= 0 else len(layers) + 1 + index :]
    # With offloaded weights, a layer instance already overrides the `forward` of its class.
    before = [vars(layer).get("forward") for layer in skipped]
    for layer in skipped:
        layer.forward = _pass_through
    try:
        yield
    finally:
        for layer, forward in zip(skipped, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
