"""The decode step: one more token for every running request, whatever its budget is.

The decoder's own layers run in a loop of ours: `transformers` gives all layers one mask, and after
a stage a slot's length differs between layers.

Shapes: N running requests, R rows of position ids (one, or four with M-RoPE).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sppruner.adapters import Adapter
from sppruner.decoder import has_full_attention
from sppruner.engine.caches.kv_slots import KVSlots
from sppruner.errors import UnsupportedModel


class DecodeStep:
    """Runs decoders of Llama's structure, as `sppruner.stages.StageDriver` does.

    compiled: the step as one graph (captured on a GPU), for a cache of fixed capacity. Raises
    UnsupportedModel for a decoder without full causal attention in every layer.
    """

    def __init__(self, adapter: Adapter, *, compiled: bool = False) -> None:
        self._decoder = adapter.language_model()
        self._embed = adapter.model.get_input_embeddings()
        self._head = adapter.model.get_output_embeddings()
        if not has_full_attention(self._decoder.config):
            raise UnsupportedModel(
                f"{adapter.capabilities.family}: a decoder with windows or chunks of attention "
                "cannot run in slots; a BatchEngine can run it"
            )
        self._forward: Any = self._run
        if compiled:
            self._forward = torch.compile(
                self._run,
                fullgraph=True,
                dynamic=False,
                mode="reduce-overhead" if adapter.model.device.type == "cuda" else None,
            )

    def __call__(
        self,
        tokens_N: Tensor,
        positions_RN: Tensor,
        cache: KVSlots,
        dropped_LN: Tensor | None = None,
    ) -> Tensor:
        """Logits [N, vocabulary] after `tokens_N`, whose positions are `positions_RN`.

        dropped_LN: tokens that stages have dropped of each row in front of each of the L layers,
        where positions are renumbered: the position there is smaller by as many; only with one row
        of positions. None where no row is renumbered, except in a compiled engine, which would need
        a graph of its own for it.

        Reads and writes the first N slots; the caller counts the token with `KVSlots.end_step`.
        """
        cache.begin_step(len(tokens_N))
        logits: Tensor = self._forward(tokens_N, positions_RN, cache, dropped_LN)
        return logits

    def _run(
        self, tokens_N: Tensor, positions_RN: Tensor, cache: KVSlots, dropped_LN: Tensor | None
    ) -> Tensor:
        hidden = self._embed(tokens_N[:, None])
        text_N1 = positions_RN[0, :, None]
        # Of four rows the first counts text only; rotary embeddings use time, height and width.
        rotated = text_N1 if len(positions_RN) == 1 else positions_RN[1:, :, None]
        if dropped_LN is not None:
            rotated = text_N1 - dropped_LN.T  # of every layer at once
        rotary = all_rotary = self._decoder.rotary_emb(hidden, rotated)
        mask = None
        for index, layer in enumerate(self._decoder.layers):
            if cache.starts_segment(index):
                mask = cache.mask(index)
            if dropped_LN is not None:
                text_N1 = rotated[:, index : index + 1]
                rotary = tuple(part[:, index : index + 1] for part in all_rotary)
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=text_N1,
                past_key_values=cache,
                use_cache=True,
            )
        return self._head(self._decoder.norm(hidden))[:, 0]
