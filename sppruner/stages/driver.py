"""Prunes inside the decoder while an unmodified `generate` runs.

In front of a stage layer the visual tokens are ranked by the attention that the last token pays
them, in the layer before or in the stage's own, pruned to each row's count and re-packed
left-padded. The layers from there on get the rotary embeddings and the mask of the kept tokens, in
the prefill and in every decode step. So each layer of the KV cache has its own length, and every
token keeps its original position or, in a plan that renumbers, gets its index among the kept ones.

Shapes: B batch rows (times beams or return sequences), L tokens of the packed prompt at the current
layer, S their number before it, D hidden width.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import create_causal_mask

from sppruner.adapters import Adapter
from sppruner.compact import full_positions, keep_to_index
from sppruner.decoder import first_prunable_layer
from sppruner.errors import InputError, PruningHadNoEffect, UnsupportedModel
from sppruner.signals import probing
from sppruner.stages.plan import StagePlan, most_attended
from sppruner.stages.probe import LastQueryProbe, can_compute_last_query_row, compute_last_query_row


class StageDriver:
    """Executes a plan during one `generate` call, as a context manager around it.

    Works with any decoder of Llama's structure: `.layers` that take `position_embeddings`,
    `attention_mask`, `position_ids` and `past_key_values`, each with a `.self_attn`. `generate` may
    multiply the rows (beams, return sequences) and use any growing or static cache; it compiles
    nothing inside the context.

    Raises UnsupportedModel for decoders without full causal attention and for layers whose scores
    the plan needs but that `compute_last_query_row` does not support; InputError for a `generate`
    that does not read the prompt in one forward and then one token per forward; and, on exit,
    PruningHadNoEffect if a stage was never reached.
    """

    def __init__(self, adapter: Adapter, plan: StagePlan) -> None:
        self._decoder = adapter.language_model()
        first = first_prunable_layer(self._decoder.config)
        if first is None or min(plan.keep) < first:
            raise UnsupportedModel(
                f"{adapter.capabilities.family}: this decoder cannot be pruned in front of layer "
                f"{min(plan.keep)}; use a method that prunes before the decoder, such as 'sppruner'"
            )
        scored = [index for index, rows in plan.stage_scored.items() if any(rows)]
        if not all(can_compute_last_query_row(self._decoder.layers[index]) for index in scored):
            raise UnsupportedModel(
                f"{adapter.capabilities.family}: layers of this decoder cannot be scored in "
                "advance; use 'pyramiddrop' with scoring='before', or another method"
            )
        self._plan = plan
        self._stack = ExitStack()
        self._probe_stack = ExitStack()
        self._probes: dict[int, LastQueryProbe] = {}
        # The prompt at the current layer, with rows multiplied as in `generate`.
        self._visual_BL = plan.visual_BL
        self._mask_BL = plan.attention_mask_BL
        # The attention mask at each stage that was reached, for decode steps.
        self._masks: dict[int, Tensor] = {}
        # Prompt tokens of each row, [B, 1], that are dropped up to each stage that was reached.
        self._dropped: dict[int, Tensor] = {}
        # Layer arguments that replace the decoder's from the last stage on.
        self._replaced: dict[str, Any] = {}

    def __enter__(self) -> StageDriver:
        layers = self._decoder.layers
        with ExitStack() as stack:
            # `generate` compiles decode steps over a static cache, and compiled code does not see
            # hooks change: it would run without them, or with those of another batch.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for index in range(min(self._plan.keep), len(layers)):
                hook = layers[index].register_forward_pre_hook(
                    partial(self._before_layer, index), with_kwargs=True
                )
                stack.callback(hook.remove)
            self._probes = {
                index: LastQueryProbe(layers[index - 1].self_attn)
                for index in self._plan.keep
                if not all(self._plan.stage_scored.get(index, [False]))
            }
            self._probe_stack = stack.enter_context(ExitStack())
            if self._probes:
                self._probe_stack.enter_context(probing(self._decoder, *self._probes.values()))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        if error is None and len(self._masks) < len(self._plan.keep):
            raise PruningHadNoEffect(
                f"stages at layers {sorted(self._plan.keep)} were planned, {sorted(self._masks)} "
                "were reached"
            )

    def _before_layer(
        self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of every layer from the first stage on."""
        hidden_BLD, *others = args
        if index == min(self._plan.keep):
            self._replaced = {}
        if index in self._plan.keep:
            if index in self._masks:
                self._check_step(hidden_BLD, kwargs)
                if self._plan.renumber:
                    positions_B1 = kwargs["position_ids"] - self._dropped[index]
                    self._replaced |= self._position_arguments(hidden_BLD, positions_B1)
            else:
                hidden_BLD = self._prune(index, layer, hidden_BLD, kwargs | self._replaced)
            self._replaced["attention_mask"] = self._causal_mask(
                index, hidden_BLD, kwargs["past_key_values"]
            )
        return (hidden_BLD, *others), kwargs | self._replaced

    def _prune(self, index: int, layer: Any, hidden_BLD: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Drops tokens in front of layer `index`; returns the hidden states of those that are
        kept."""
        if not self._masks:
            self._check_prompt(hidden_BLD, kwargs)
            copies = len(hidden_BLD) // len(self._visual_BL)
            self._visual_BL = self._visual_BL.to(hidden_BLD.device).repeat_interleave(copies, dim=0)
            self._mask_BL = self._mask_BL.to(hidden_BLD.device).repeat_interleave(copies, dim=0)
        keep = torch.tensor(self._plan.keep[index], device=hidden_BLD.device)
        keep_B = keep.repeat_interleave(len(hidden_BLD) // len(keep))
        row_BL = self._scores(index, layer, hidden_BLD, kwargs["position_embeddings"])
        kept_BL = most_attended(row_BL, self._visual_BL, keep_B)
        before_B1 = self._mask_BL.sum(dim=1, keepdim=True)
        order_BL, self._mask_BL = keep_to_index(kept_BL | (self._mask_BL.bool() & ~self._visual_BL))
        self._visual_BL = self._visual_BL.gather(1, order_BL) & self._mask_BL.bool()
        dropped_B1 = before_B1 - self._mask_BL.sum(dim=1, keepdim=True)
        self._dropped[index] = dropped_B1 + (self._dropped[max(self._masks)] if self._masks else 0)
        self._masks[index] = self._mask_BL
        if len(self._masks) == len(self._plan.keep):
            self._probe_stack.close()

        if self._plan.renumber:
            kept_BLD = _gather(hidden_BLD, order_BL)
            self._replaced = self._position_arguments(kept_BLD, full_positions(self._mask_BL)[0])
            return kept_BLD
        positions_BL = kwargs.get("position_ids")
        self._replaced = {
            "position_embeddings": tuple(
                _gather(rotary_BLD, order_BL) for rotary_BLD in kwargs["position_embeddings"]
            ),
            "position_ids": None if positions_BL is None else _gather(positions_BL, order_BL),
        }
        return _gather(hidden_BLD, order_BL)

    def _scores(
        self, index: int, layer: Any, hidden_BLD: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[B, L] attention of the last token that each row ranks by at this stage."""
        rows = self._plan.stage_scored.get(index, [False])
        if not any(rows):
            return self._probes[index].take(self._mask_BL)
        stage_BL = compute_last_query_row(layer, hidden_BLD, rotary, self._mask_BL)
        if all(rows):
            return stage_BL
        stage_scored_B1 = torch.tensor(rows, device=hidden_BLD.device)[:, None]
        stage_scored_B1 = stage_scored_B1.repeat_interleave(len(hidden_BLD) // len(rows), dim=0)
        return torch.where(stage_scored_B1, stage_BL, self._probes[index].take(self._mask_BL))

    def _position_arguments(self, hidden_BLD: Tensor, positions_BL: Tensor) -> dict[str, Any]:
        """A layer's arguments for tokens at positions that differ from the decoder's."""
        rotary = self._decoder.rotary_emb(hidden_BLD, positions_BL)
        return {"position_embeddings": rotary, "position_ids": positions_BL}

    def _causal_mask(self, index: int, hidden_BLD: Tensor, cache: Any) -> Any:
        """The mask of a stage's layers, made as the decoder makes its own. No token after the
        prompt is padding; unused positions of a static cache are hidden by causality."""
        mask_BL = self._masks[index]
        length, _ = cache.get_mask_sizes(hidden_BLD.shape[1], index)
        return create_causal_mask(
            config=self._decoder.config,
            inputs_embeds=hidden_BLD,
            attention_mask=pad(mask_BL, (0, length - mask_BL.shape[1]), value=1),
            past_key_values=cache,
            layer_idx=index,
        )

    def _check_prompt(self, hidden_BLD: Tensor, kwargs: dict[str, Any]) -> None:
        rows, length = self._visual_BL.shape
        whole = hidden_BLD.shape[1] == length and hidden_BLD.shape[0] % rows == 0
        if not whole or kwargs.get("past_key_values") is None:
            raise _unsupported_generate(
                f"the first forward held {hidden_BLD.shape[1]} of {length} tokens"
            )

    def _check_step(self, hidden_BLD: Tensor, kwargs: dict[str, Any]) -> None:
        if hidden_BLD.shape[1] != 1 or len(hidden_BLD) != len(self._mask_BL):
            raise _unsupported_generate(
                f"a forward after the prompt held {hidden_BLD.shape[1]} tokens"
            )


def _gather(values: Tensor, order_BL: Tensor) -> Tensor:
    """The entries of [B or 1, S] or [B or 1, S, D] in the order of `order_BL`."""
    rows, length = order_BL.shape
    expanded = values.expand(rows, *values.shape[1:])
    index = order_BL.view(rows, length, *[1] * (values.dim() - 2))
    return expanded.gather(1, index.expand(-1, -1, *values.shape[2:]))


def _unsupported_generate(found: str) -> InputError:
    return InputError(
        f"pruning inside the decoder needs the whole prompt in one forward, a KV cache, and then "
        f"one token per forward ({found}): leave out prefill_chunk_size, assistant_model, "
        "prompt_lookup_num_tokens, use_cache=False and a cache that is not empty, or use a method "
        "that prunes before the decoder"
    )
