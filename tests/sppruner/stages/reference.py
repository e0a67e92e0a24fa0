"""The reference for pruning inside the decoder: the whole sequence with eager attention, in which a
mask hides dropped tokens from each stage's layer on. Nothing is re-packed. Scores are the attention
maps that eager attention returns: those of the layer before a stage or, for plans that score by the
stage's layer, those of its attention module on the hidden states that enter it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sppruner.pruner import Prepared
from sppruner.stages import StagePlan


class Hidden:
    """Hides the tokens that a plan drops from the layers of a decoder, selected by its own maps."""

    def __init__(self, decoder: Any, plan: StagePlan) -> None:
        self.decoder = decoder
        self.plan = plan
        self.length = plan.visual_BL.shape[1]
        self.maps: dict[int, Tensor] = {}
        self.dropped: dict[int, Tensor] = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        layers = self.decoder.layers
        handles = []
        for index in range(len(layers)):
            hide = partial(self._hide, index)
            handles.append(layers[index].register_forward_pre_hook(hide, with_kwargs=True))
            handles.append(layers[index].self_attn.register_forward_hook(partial(self._map, index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _map(self, index: int, module: Any, args: Any, output: Any) -> None:
        self.maps[index] = output[1]

    def _hide(self, index: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = self._given(args[0], kwargs, [layer for layer in self.dropped if layer <= index])
        if index not in self.plan.keep or index in self.dropped:
            return args, given
        rows_BL = self._row(self.maps[index - 1])
        if any(self.plan.stage_scored.get(index, [False])):
            _, stage_map = module.self_attn(
                module.input_layernorm(args[0]),
                position_embeddings=given["position_embeddings"],
                attention_mask=given["attention_mask"],
            )
            copies = len(rows_BL) // len(self.plan.visual_BL)
            stage_scored_B = torch.tensor(self.plan.stage_scored[index]).repeat_interleave(copies)
            rows_BL = torch.where(stage_scored_B[:, None], self._row(stage_map), rows_BL)
        self.dropped[index] = self._choose(index, rows_BL)
        return args, self._given(args[0], kwargs, list(self.dropped))

    def _given(
        self, hidden_BQD: Tensor, kwargs: dict[str, Any], before: Sequence[int]
    ) -> dict[str, Any]:
        """A layer's arguments after the stages `before` it."""
        if not before:
            return kwargs
        mask_B1QK = kwargs["attention_mask"]
        dropped_BL = self.dropped[max(before)]
        later = mask_B1QK.shape[-1] - dropped_BL.shape[1]
        hidden_BK = torch.nn.functional.pad(dropped_BL, (0, later), value=False)
        least = torch.finfo(mask_B1QK.dtype).min
        hidden_B1QK = mask_B1QK.masked_fill(hidden_BK[:, None, None], least)
        masked = kwargs | {"attention_mask": hidden_B1QK}
        if not self.plan.renumber:
            return masked
        copies = len(hidden_BK) // len(self.plan.visual_BL)
        prompt_BL = self.plan.attention_mask_BL.bool().repeat_interleave(copies, dim=0)
        there_BK = torch.nn.functional.pad(prompt_BL, (0, later), value=True) & ~hidden_BK
        places_BQ = (there_BK.cumsum(dim=1) - 1).clamp(min=0)[:, -hidden_BQD.shape[1] :]
        return masked | {"position_embeddings": self.decoder.rotary_emb(hidden_BQD, places_BQ)}

    def _row(self, map_BHQK: Tensor) -> Tensor:
        return map_BHQK[:, :, self.length - 1, : self.length].mean(dim=1)

    def _choose(self, index: int, rows_BL: Tensor) -> Tensor:
        copies = len(rows_BL) // len(self.plan.visual_BL)
        visual_BL = self.plan.visual_BL.repeat_interleave(copies, dim=0)
        earlier = [self.dropped[layer] for layer in self.dropped]
        dropped_BL = earlier[-1].clone() if earlier else torch.zeros_like(visual_BL)
        for row, kept in enumerate(self.plan.keep[index]):
            for copy in range(row * copies, (row + 1) * copies):
                there = (visual_BL[copy] & ~dropped_BL[copy]).nonzero().squeeze(1).tolist()
                ranked = sorted(there, key=lambda at: (-float(rows_BL[copy, at]), at))
                dropped_BL[copy, ranked[kept:]] = True
        return dropped_BL


def recomputed(model: Any, decoder: Any, prepared: Prepared, tokens_BT: Tensor) -> Tensor:
    """[B, T, vocabulary] logits at each of the new tokens, from one forward over the prompt and
    all of them, without a cache. model: with eager attention."""
    prompt: list[dict[str, Any]] = []

    def capture(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        prompt.append(kwargs)

    handle = decoder.register_forward_pre_hook(capture, with_kwargs=True)
    model.generate(**prepared.inputs, max_new_tokens=1, do_sample=False)
    handle.remove()
    given = prompt[0]
    fed_BT = tokens_BT[:, :-1]
    positions = prepared.inputs["position_ids"]
    steps = torch.arange(1, fed_BT.shape[1] + 1)
    sequence: dict[str, Any] = {
        "inputs_embeds": _extended(given["inputs_embeds"], decoder.embed_tokens(fed_BT)),
        "attention_mask": _extended(prepared.inputs["attention_mask"], torch.ones_like(fed_BT)),
        "position_ids": torch.cat([positions, positions[..., -1:] + steps], dim=-1),
    }
    if given.get("visual_pos_masks") is not None:
        fill_BT = torch.zeros_like(fed_BT, dtype=torch.bool)
        sequence["visual_pos_masks"] = _extended(given["visual_pos_masks"], fill_BT)
        sequence["deepstack_visual_embeds"] = given["deepstack_visual_embeds"]
    assert prepared.stages is not None
    with torch.no_grad(), Hidden(decoder, prepared.stages).hooks():
        hidden_BSD = decoder(**sequence, use_cache=False).last_hidden_state
        logits: Tensor = model.get_output_embeddings()(hidden_BSD)
    return logits[:, given["inputs_embeds"].shape[1] - 1 :]


def _extended(prompt: Tensor, new: Tensor) -> Tensor:
    return torch.cat([prompt, new], dim=1)


def hidden(decoder: Any, prepared: Prepared) -> Any:
    """A context in which plain `generate` of `prepared` on an eager model is the reference."""
    assert prepared.stages is not None
    return Hidden(decoder, prepared.stages).hooks()


def halving(
    prepared: Prepared,
    visual_BL: Tensor,
    layers: Sequence[int],
    *,
    stage_scored: Sequence[bool] | None = None,
    renumber: bool = False,
) -> StagePlan:
    """A plan that keeps half of each row's visual tokens at every stage. stage_scored: whether each
    row ranks by the scores of the stage's layer."""
    keep: dict[int, list[int]] = {}
    counts = visual_BL.sum(dim=1).tolist()
    for layer in layers:
        counts = [count // 2 for count in counts]
        keep[layer] = counts
    return StagePlan(
        keep=keep,
        attention_mask_BL=prepared.inputs["attention_mask"],
        visual_BL=visual_BL,
        stage_scored={}
        if stage_scored is None
        else {layer: list(stage_scored) for layer in layers},
        renumber=renumber,
    )
