"""The decode step: one more token for every running request, whatever its budget was.

The decoder's own layers, in a loop of ours: `transformers` gives all layers one mask, and slots are
differently long at the layers behind a stage. Shapes: R rows of position ids (one, or four with
M-RoPE), N running requests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sppruner.adapters import Adapter
from sppruner.engine.slots import SlotCache
from sppruner.errors import UnsupportedModel
from sppruner.stages import stages_from


class DecodeStep:
    """Works with decoders of Llama's shape, as `sppruner.stages.StageDriver` does.

    compiled: the step as one graph (on a GPU: captured), to be used with a cache of fixed capacity.
    Raises UnsupportedModel for decoders without full causal attention in every layer.
    """

    def __init__(self, adapter: Adapter, *, compiled: bool = False) -> None:
        self._decoder = adapter.language_model()
        self._embed = adapter.model.get_input_embeddings()
        self._head = adapter.model.get_output_embeddings()
        if stages_from(self._decoder.config) is None:
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
        cache: SlotCache,
        lost_LN: Tensor | None = None,
    ) -> Tensor:
        """Logits [N, vocabulary] behind `tokens_N`, which stand at `positions_RN`.

        lost_LN: by how much a row stands further in front at each layer, where stages renumber;
        only with one row of positions. None, where none does, has a graph of its own. Reads and
        writes the first N slots; counting the token is left to `SlotCache.end`.
        """
        cache.begin(len(tokens_N))
        logits: Tensor = self._forward(tokens_N, positions_RN, cache, lost_LN)
        return logits

    def _run(
        self, tokens_N: Tensor, positions_RN: Tensor, cache: SlotCache, lost_LN: Tensor | None
    ) -> Tensor:
        hidden = self._embed(tokens_N[:, None])
        text_N1 = positions_RN[0, :, None]
        # With four rows the first one counts text alone; time, height and width rotate.
        turned = text_N1 if len(positions_RN) == 1 else positions_RN[1:, :, None]
        if lost_LN is not None:
            turned = text_N1 - lost_LN.T  # of every layer at once
        rotary = turning = self._decoder.rotary_emb(hidden, turned)
        mask = None
        for index, layer in enumerate(self._decoder.layers):
            if cache.starts_segment(index):
                mask = cache.mask(index)
            if lost_LN is not None:
                text_N1 = turned[:, index : index + 1]
                rotary = tuple(part[:, index : index + 1] for part in turning)
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=text_N1,
                past_key_values=cache,
                use_cache=True,
            )
        return self._head(self._decoder.norm(hidden))[:, 0]
