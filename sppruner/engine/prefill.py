"""The prefill: a group of prompts is read once, each pruned under its own spec.

Shapes: V vocabulary, R rows of position ids (one, or four with M-RoPE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from sppruner.pruner import Pruner
from sppruner.spec import PruneSpec
from sppruner.stages import StageDriver
from sppruner.types import PruneReport


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefilled:
    """One prompt as the decoder left it.

    logits_V: behind its last token. ids: its tokens as the decoder read them. positions: of the
    next token, R of them. keys, values: of each layer, [heads, length, width] views into the
    group's cache: valid until the next one is read.
    """

    logits_V: Tensor
    ids: list[int]
    positions: list[int]
    keys: list[Tensor]
    values: list[Tensor]
    report: PruneReport


@torch.inference_mode()
def prefill(
    pruner: Pruner,
    inputs: Mapping[str, Tensor],
    specs: Sequence[PruneSpec],
    instructions: Sequence[str],
) -> list[Prefilled]:
    """Encodes, selects, re-packs and reads a batch. Raises what `Pruner.prepare` raises."""
    prepared = pruner.prepare(inputs, specs, instructions)
    packed = dict(prepared.inputs)
    if "position_ids" not in packed:  # nobody has an image, nothing was moved
        positions_RBS = pruner.adapter.positions(inputs)
        packed["position_ids"] = positions_RBS[0] if len(positions_RBS) == 1 else positions_RBS
    ids_BL = packed["input_ids"]
    if "inputs_embeds" in packed:  # as `generate` does: ids then only say how long a prompt is
        del packed["input_ids"]
    cache = DynamicCache()
    stages = prepared.stages
    with nullcontext() if stages is None else StageDriver(pruner.adapter, stages):
        output = pruner.model(**packed, past_key_values=cache, use_cache=True, logits_to_keep=1)
    position_ids = packed["position_ids"]
    last_RB = position_ids.view(-1, *position_ids.shape[-2:])[..., -1]
    next_BR = (last_RB.T + 1).tolist()
    rows = []
    for row, report in enumerate(prepared.reports):
        real = packed["attention_mask"][row].bool()
        # Padding is on the left, at every layer.
        spans = [slice(-length, None) for length in report.layer_tokens]
        rows.append(
            Prefilled(
                logits_V=output.logits[row, -1],
                ids=ids_BL[row, real].tolist(),
                positions=next_BR[row],
                keys=[la.keys[row, :, at] for la, at in zip(cache.layers, spans, strict=True)],
                values=[la.values[row, :, at] for la, at in zip(cache.layers, spans, strict=True)],
                report=report,
            )
        )
    return rows
