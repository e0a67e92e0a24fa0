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
from torch.nn.functional import pad
from transformers import DynamicCache

from sppruner.adapters import Encoded
from sppruner.engine.caches.encoder import EncoderCache
from sppruner.engine.caches.prefix import Prefix, PrefixCache
from sppruner.engine.collate import collate
from sppruner.engine.preparation import Asked
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
    pruner: Pruner,
    group: Sequence[Asked],
    encodings: EncoderCache | None = None,
    prefixes: PrefixCache | None = None,
) -> list[Prefilled]:
    """Reads prompts of one kind, in one forward or two.

    encodings: of earlier prompts, where images are looked up and kept; without, each is encoded.
    prefixes: of earlier prompts and of this group's own. A beginning that several share is read
    with the first of them, and of the others only the text behind it; without, every prompt is
    read whole. Raises what `Pruner.prepare` raises, and then nothing was kept.
    """
    if prefixes is None:
        return _read(pruner, group, encodings)
    names = {asked.prefix for asked in group if asked.prefix is not None}
    begun = {name: found for name in names if (found := prefixes.find(name)) is not None}
    whole, rest, coming = list[Asked](), list[Asked](), set(begun)
    for asked in group:
        (rest if asked.prefix in coming else whole).append(asked)
        if asked.prefix is not None:
            coming.add(asked.prefix)
    read: dict[Asked, Prefilled] = {}
    if whole:
        read.update(zip(whole, _read(pruner, whole, encodings), strict=True))
    for asked in whole:
        if asked.prefix is not None:
            begun[asked.prefix] = _beginning(read[asked], asked.behind)
            prefixes.keep(asked.prefix, begun[asked.prefix])
    if rest:
        known = [begun[asked.prefix] for asked in rest if asked.prefix is not None]
        read.update(zip(rest, _read_on(pruner, rest, known), strict=True))
    prefixes.misses += sum(asked.prefix is not None for asked in whole)
    prefixes.hits += len(rest)
    return [read[asked] for asked in group]


def _read(
    pruner: Pruner, group: Sequence[Asked], encodings: EncoderCache | None
) -> list[Prefilled]:
    """Encodes, selects, re-packs and reads prompts whole."""
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


def _beginning(read: Prefilled, behind: int) -> Prefix:
    """Of a prompt that was read, without the last `behind` tokens."""
    length = len(read.ids) - behind
    return Prefix(
        keys=[key[:, :length] for key in read.keys],
        values=[value[:, :length] for value in read.values],
        ids=read.ids[:length],
        positions=[position - behind for position in read.positions],
        report=read.report,
        behind=behind,
    )


def _read_on(pruner: Pruner, group: Sequence[Asked], begun: Sequence[Prefix]) -> list[Prefilled]:
    """Reads the text behind beginnings that are known, padded on the left like those."""
    texts = [asked.inputs["input_ids"][0, -asked.behind :] for asked in group]
    before, behind = max(len(prefix.ids) for prefix in begun), max(map(len, texts))
    cache = DynamicCache()
    for layer in range(len(begun[0].keys)):
        keys = [_left_padded(prefix.keys[layer], before) for prefix in begun]
        values = [_left_padded(prefix.values[layer], before) for prefix in begun]
        cache.update(torch.stack(keys), torch.stack(values), layer)
    mask_BL = torch.zeros(len(group), before + behind, dtype=torch.int64)
    positions_BRS = torch.zeros(len(group), len(begun[0].positions), behind, dtype=torch.int64)
    for row, (prefix, text) in enumerate(zip(begun, texts, strict=True)):
        mask_BL[row, before - len(prefix.ids) : before] = 1
        mask_BL[row, -len(text) :] = 1
        first_R1 = torch.tensor(prefix.positions)[:, None]
        positions_BRS[row, :, -len(text) :] = first_R1 + torch.arange(len(text))
    positions_RBS = positions_BRS.transpose(0, 1)
    ids_BS = collate([{"input_ids": text[None]} for text in texts], pruner.pad_id)["input_ids"]
    device = pruner.model.device
    output = pruner.model(
        input_ids=ids_BS.to(device),
        attention_mask=mask_BL.to(device),
        position_ids=(positions_RBS[0] if len(positions_RBS) == 1 else positions_RBS).to(device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )

    def whole(states_BHLW: Tensor, row: int) -> Tensor:
        held_HLW = states_BHLW[row, :, before - len(begun[row].ids) : before]
        return torch.cat([held_HLW, states_BHLW[row, :, -len(texts[row]) :]], dim=1)

    return [
        Prefilled(
            logits_V=output.logits[row, -1],
            ids=prefix.ids + text.tolist(),
            positions=[position + len(text) for position in prefix.positions],
            keys=[whole(layer.keys, row) for layer in cache.layers],
            values=[whole(layer.values, row) for layer in cache.layers],
            report=prefix.reported(len(text)),
        )
        for row, (prefix, text) in enumerate(zip(begun, texts, strict=True))
    ]


def _left_padded(states_HLW: Tensor, length: int) -> Tensor:
    return pad(states_HLW, (0, 0, length - states_HLW.shape[1], 0))


def _encoded(pruner: Pruner, group: Sequence[Asked], encodings: EncoderCache) -> Encoded:
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
