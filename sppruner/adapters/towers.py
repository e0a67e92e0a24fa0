"""The vision towers of unmodified models with less work, on the same data by the same kernels: on a
CPU, features stay what they were bit for bit.

Towers that pack windows and images into one sequence attend to them span by span; here neighbours
of one length share a call. And layers behind the state that is read do not run.
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
# Only to a name with "flash" in it do towers give the whole sequence, with the spans' borders.
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
    """[1, P, H, D]: the spans of a packed sequence, each attending to itself alone.

    Neighbours of one length go to SDPA as one batch. Its entries are views: spans of one length
    that lie apart would have to be copied, which costs more on a CPU than the calls it saves.
    """
    runs = [(n, len(list(spans))) for n, spans in groupby(cu_seq_lens_q.diff().tolist())]
    sizes = [length * count for length, count in runs]
    parts = zip(
        *(torch.split(x[0], sizes, dim=1) for x in (query_1HPD, key_1HPD, value_1HPD)), strict=True
    )
    attended = []
    for (length, count), part in zip(runs, parts, strict=True):
        query, key, value = (
            x_HPD.view(-1, count, length, x_HPD.shape[-1]).transpose(0, 1) for x_HPD in part
        )
        output, _ = ALL_ATTENTION_FUNCTIONS[_SDPA](
            module, query, key, value, attention_mask, **kwargs
        )
        attended.append(output.flatten(0, 1))
    return torch.cat(attended)[None], None


AttentionInterface.register(_SPANS, _attend_within_spans)
AttentionMaskInterface.register(_SPANS, ALL_MASK_ATTENTION_FUNCTIONS[_SDPA])


@contextmanager
def batched_span_attention(tower: Any) -> Iterator[None]:
    """Inside the block, a tower that packs images into one sequence attends to neighbouring spans
    of one length in one call. A tower with another attention than SDPA keeps its own."""
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
    """Inside the block, layers behind hidden state `index` (0 is the embeddings, -1 the last) hand
    on what they are given: what the tower returns of them is no more than that state.

    The layers stay where they are, and only their `forward` is covered: transformers installs what
    records hidden states on a tower's first forward, once and for all its layers.
    """
    behind = list(layers)[index if index >= 0 else len(layers) + 1 + index :]
    # Where weights are offloaded, a layer already has a `forward` in front of its class's.
    before = [vars(layer).get("forward") for layer in behind]
    for layer in behind:
        layer.forward = _pass_through
    try:
        yield
    finally:
        for layer, forward in zip(behind, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
