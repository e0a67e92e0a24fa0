"""Prunes inside the decoder while an unmodified `generate` runs.

In front of a stage layer the prompt is scored by the attention row of its last token, the one it
paid in the layer before or the one it would pay in the stage's own, cut to each row's count and
re-packed left-padded; the layers from there on get the rotary embeddings and the mask of what is
left, in the prefill and in every later step. Each layer of the KV cache then holds its own length,
and every token its original position, or, in a plan that renumbers, its place among those left.
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
from sppruner.stages.probe import LastQueryProbe, compute_last_query_row, can_compute_last_query_row


class StageDriver:
    """Carries out a plan during one `generate` call, as a context manager around it.

    Works with any decoder of Llama's shape: `.layers` that take `position_embeddings`,
    `attention_mask`, `position_ids` and `past_key_values`, each with a `.self_attn`. `generate`
    may multiply the rows (beams, return sequences) and use any cache that grows or is static; it
    compiles nothing meanwhile.

    Raises UnsupportedModel for decoders without full causal attention, or whose layers cannot be
    asked for scores where the plan wants them; InputError for a `generate` that does not read the
    prompt in one forward and then one token per forward; and, at the end, PruningHadNoEffect if a
    stage was never reached.
    """

    def __init__(self, adapter: Adapter, plan: StagePlan) -> None:
        self._decoder = adapter.language_model()
        first = first_prunable_layer(self._decoder.config)
        if first is None or min(plan.keep) < first:
            raise UnsupportedModel(
                f"{adapter.capabilities.family}: this decoder cannot be pruned in front of layer "
                f"{min(plan.keep)}; use a method that prunes before the decoder, such as 'sppruner'"
            )
        asked = [index for index, rows in plan.stage_scored.items() if any(rows)]
        if not all(can_compute_last_query_row(self._decoder.layers[index]) for index in asked):
            raise UnsupportedModel(
                f"{adapter.capabilities.family}: layers of this decoder cannot be asked for scores "
                "before they run; use 'pyramiddrop' with scoring='before', or another method"
            )
        self._plan = plan
        self._stack = ExitStack()
        self._reading = ExitStack()
        self._probes: dict[int, LastQueryProbe] = {}
        # Of the prompt as the layer that runs now has it, rows multiplied as `generate` does.
        self._visual_BL = plan.visual_BL
        self._mask_BL = plan.attention_mask_BL
        # The same mask at each stage that was reached, for later steps.
        self._masks: dict[int, Tensor] = {}
        # How many tokens of the prompt each row, [B, 1], has lost at each stage that was reached.
        self._lost: dict[int, Tensor] = {}
        # What the layers from the last stage on get in place of what the decoder gives them.
        self._replaced: dict[str, Any] = {}

    def __enter__(self) -> StageDriver:
        layers = self._decoder.layers
        with ExitStack() as stack:
            # `generate` compiles the steps over a static cache, and compiled code does not notice
            # hooks that come and go: it would run without them, or with those of another batch.
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
            self._reading = stack.enter_context(ExitStack())
            if self._probes:
                self._reading.enter_context(probing(self._decoder, *self._probes.values()))
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
        """Forward-pre-hook of every layer from the first stage on."""
        hidden_BLD, *others = args
        if index == min(self._plan.keep):
            self._replaced = {}
        if index in self._plan.keep:
            if index in self._masks:
                self._check_step(hidden_BLD, kwargs)
                if self._plan.renumber:
                    positions_B1 = kwargs["position_ids"] - self._lost[index]
                    self._replaced |= self._placed(hidden_BLD, positions_B1)
            else:
                hidden_BLD = self._cut(index, layer, hidden_BLD, kwargs | self._replaced)
            self._replaced["attention_mask"] = self._causal_mask(
                index, hidden_BLD, kwargs["past_key_values"]
            )
        return (hidden_BLD, *others), kwargs | self._replaced

    def _cut(self, index: int, layer: Any, hidden_BLD: Tensor, given: dict[str, Any]) -> Tensor:
        """The hidden states of the tokens that stay from here on."""
        if not self._masks:
            self._check_prompt(hidden_BLD, given)
            copies = len(hidden_BLD) // len(self._visual_BL)
            self._visual_BL = self._visual_BL.to(hidden_BLD.device).repeat_interleave(copies, dim=0)
            self._mask_BL = self._mask_BL.to(hidden_BLD.device).repeat_interleave(copies, dim=0)
        keep = torch.tensor(self._plan.keep[index], device=hidden_BLD.device)
        keep_B = keep.repeat_interleave(len(hidden_BLD) // len(keep))
        row_BL = self._scores(index, layer, hidden_BLD, given["position_embeddings"])
        kept_BL = most_attended(row_BL, self._visual_BL, keep_B)
        before_B1 = self._mask_BL.sum(dim=1, keepdim=True)
        order_BL, self._mask_BL = keep_to_index(kept_BL | (self._mask_BL.bool() & ~self._visual_BL))
        self._visual_BL = self._visual_BL.gather(1, order_BL) & self._mask_BL.bool()
        lost_B1 = before_B1 - self._mask_BL.sum(dim=1, keepdim=True)
        self._lost[index] = lost_B1 + (self._lost[max(self._masks)] if self._masks else 0)
        self._masks[index] = self._mask_BL
        if len(self._masks) == len(self._plan.keep):
            self._reading.close()

        if self._plan.renumber:
            left_BLD = _gathered(hidden_BLD, order_BL)
            self._replaced = self._placed(left_BLD, full_positions(self._mask_BL)[0])
            return left_BLD
        positions_BL = given.get("position_ids")
        self._replaced = {
            "position_embeddings": tuple(
                _gathered(rotary_BLD, order_BL) for rotary_BLD in given["position_embeddings"]
            ),
            "position_ids": None if positions_BL is None else _gathered(positions_BL, order_BL),
        }
        return _gathered(hidden_BLD, order_BL)

    def _scores(
        self, index: int, layer: Any, hidden_BLD: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[B, L] attention of the last token that each row's stage goes by."""
        own = self._plan.stage_scored.get(index, [False])
        if not any(own):
            return self._probes[index].take(self._mask_BL)
        own_BL = compute_last_query_row(layer, hidden_BLD, rotary, self._mask_BL)
        if all(own):
            return own_BL
        own_B1 = torch.tensor(own, device=hidden_BLD.device)[:, None]
        own_B1 = own_B1.repeat_interleave(len(hidden_BLD) // len(own), dim=0)
        return torch.where(own_B1, own_BL, self._probes[index].take(self._mask_BL))

    def _placed(self, hidden_BLD: Tensor, positions_BL: Tensor) -> dict[str, Any]:
        """What layers get for tokens at positions of ours."""
        rotary = self._decoder.rotary_emb(hidden_BLD, positions_BL)
        return {"position_embeddings": rotary, "position_ids": positions_BL}

    def _causal_mask(self, index: int, hidden_BLD: Tensor, cache: Any) -> Any:
        """The mask of a stage's layers, as the decoder makes its own. Tokens after the prompt are
        all real; places of a static cache that hold nothing yet are hidden by causality."""
        mask_BL = self._masks[index]
        length, _ = cache.get_mask_sizes(hidden_BLD.shape[1], index)
        return create_causal_mask(
            config=self._decoder.config,
            inputs_embeds=hidden_BLD,
            attention_mask=pad(mask_BL, (0, length - mask_BL.shape[1]), value=1),
            past_key_values=cache,
            layer_idx=index,
        )

    def _check_prompt(self, hidden_BLD: Tensor, given: dict[str, Any]) -> None:
        rows, length = self._visual_BL.shape
        whole = hidden_BLD.shape[1] == length and hidden_BLD.shape[0] % rows == 0
        if not whole or given.get("past_key_values") is None:
            raise _unreadable(f"the first forward held {hidden_BLD.shape[1]} of {length} tokens")

    def _check_step(self, hidden_BLD: Tensor, given: dict[str, Any]) -> None:
        if hidden_BLD.shape[1] != 1 or len(hidden_BLD) != len(self._mask_BL):
            raise _unreadable(f"a forward after the prompt held {hidden_BLD.shape[1]} tokens")


def _gathered(values: Tensor, order_BL: Tensor) -> Tensor:
    """The entries of [B or 1, S] or [B or 1, S, D] in the order of `order_BL`."""
    rows, length = order_BL.shape
    expanded = values.expand(rows, *values.shape[1:])
    index = order_BL.view(rows, length, *[1] * (values.dim() - 2))
    return expanded.gather(1, index.expand(-1, -1, *values.shape[2:]))


def _unreadable(found: str) -> InputError:
    return InputError(
        f"pruning inside the decoder needs the whole prompt in one forward, a KV cache, and then "
        f"one token per forward ({found}): leave out prefill_chunk_size, assistant_model, "
        "prompt_lookup_num_tokens, use_cache=False and a cache that is not empty, or use a method "
        "that prunes before the decoder"
    )
