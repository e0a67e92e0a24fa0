"""The prefill: a group of prompts is read once, each pruned under its own spec.

Shapes: V vocabulary, R rows of position ids (one, or four with M-RoPE).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import DynamicCache

from sppruner.adapters import Encoded
from sppruner.engine.asking import Asked
from sppruner.engine.collate import collate
from sppruner.engine.encodings import Encodings
from sppruner.pruner import Pruner
from sppruner.stages import StageDriver
from sppruner.types import PruneReport

# What the encoder alone reads, and large: it goes to the device only for prompts to be encoded.
_PIXELS: Final = frozenset({"pixel_values", "pixel_attention_mask"})


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
    pruner: Pruner, group: Sequence[Asked], encodings: Encodings | None = None
) -> list[Prefilled]:
    """Encodes, selects, re-packs and reads prompts of one kind.

    encodings: of earlier prompts, where images are looked up and kept; without, each is encoded.
    Raises what `Pruner.prepare` raises.
    """
    encoded = None
    if encodings is not None and group[0].content:
        encoded = _encoded(pruner, group, encodings)
    inputs = _batch(pruner, group, without=() if encoded is None else _PIXELS)
    prepared = pruner.prepare(
        inputs,
        [asked.request.spec for asked in group],
        [asked.request.prompt for asked in group],
        encoded=encoded,
    )
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


def _encoded(pruner: Pruner, group: Sequence[Asked], encodings: Encodings) -> Encoded:
    """What the images of a group encode to; those not held go through the tower together."""

    def encode(missing: Sequence[int], signals: frozenset[str]) -> Encoded:
        inputs = _batch(pruner, [group[i] for i in missing])
        return pruner.adapter.encode(inputs, signals)

    return encodings.of(
        [asked.content for asked in group],
        [pruner.signals([asked.request.spec]) for asked in group],
        encode,
    )


def _batch(
    pruner: Pruner, group: Sequence[Asked], *, without: Collection[str] = ()
) -> dict[str, Tensor]:
    """The group's tensors on the model's device, but for some entries."""
    prompts = [
        {name: value for name, value in asked.inputs.items() if name not in without}
        for asked in group
    ]
    batch = collate(prompts, pruner.pad_id)
    return {name: value.to(pruner.model.device) for name, value in batch.items()}
