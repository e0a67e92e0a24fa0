"""The prefill: a group of prompts is read once, each pruned under its own spec.

Shapes: B prompts of the group, S tokens of the processor's prompts or of suffixes, L tokens as the
decoder reads them, R rows of position ids (one, or four with M-RoPE), V vocabulary, H KV heads, W
width of a head.
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
from sppruner.engine.preparation import PreparedRequest
from sppruner.pruner import Pruner
from sppruner.stages import StageDriver
from sppruner.types import PruneReport

# Large entries that only the encoder reads: they go to the device only for images to be encoded.
_PIXELS: Final = frozenset({"pixel_values", "pixel_attention_mask"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefilled:
    """One prompt after its prefill."""

    logits_V: Tensor
    """Logits after its last token."""

    ids: list[int]
    """Its token ids as the decoder read them."""

    positions: list[int]
    """R position ids of the next token."""

    keys: list[Tensor]
    """Keys of each layer, [heads, length, width]: views into the group's cache, valid until the
    next prefill."""

    values: list[Tensor]
    """Values of each layer, as `keys`."""

    report: PruneReport
    """What was pruned of it."""

    images_cached: bool = False
    """Whether the features of its images were in the encoder cache."""

    suffix_tokens: int | None = None
    """Tokens behind a prefix whose keys and values were known; None where it was read whole."""


@torch.inference_mode()
def prefill(
    pruner: Pruner,
    group: Sequence[PreparedRequest],
    encoder_cache: EncoderCache | None = None,
    prefix_cache: PrefixCache | None = None,
) -> list[Prefilled]:
    """Prefills prompts of one kind, in one forward or two.

    encoder_cache: holds vision features of earlier prompts; without it, each image is encoded.
    prefix_cache: holds prefixes of earlier prompts. A prefix that several prompts share is read
    with the first of them; of the others only the suffix is read. Without it, every prompt is read
    whole. Raises what `Pruner.prepare` and the stages raise; images that were encoded by then stay
    cached.
    """
    if prefix_cache is None:
        return _prefill_whole(pruner, group, encoder_cache)
    keys = {prepared.prefix_key for prepared in group if prepared.prefix_key is not None}
    prefixes = {key: held for key in keys if (held := prefix_cache.get(key)) is not None}
    whole, rest, shared = list[PreparedRequest](), list[PreparedRequest](), set(prefixes)
    for prepared in group:
        (rest if prepared.prefix_key in shared else whole).append(prepared)
        if prepared.prefix_key is not None:
            shared.add(prepared.prefix_key)
    done: dict[PreparedRequest, Prefilled] = {}
    if whole:
        done.update(zip(whole, _prefill_whole(pruner, whole, encoder_cache), strict=True))
    for prepared in whole:
        if prepared.prefix_key is not None:
            prefix = _cut_prefix(done[prepared], prepared.suffix_tokens)
            prefixes[prepared.prefix_key] = prefix
            prefix_cache.put(prepared.prefix_key, prefix)
    if rest:
        known = [prefixes[r.prefix_key] for r in rest if r.prefix_key is not None]
        done.update(zip(rest, _prefill_suffixes(pruner, rest, known), strict=True))
    prefix_cache.misses += sum(prepared.prefix_key is not None for prepared in whole)
    prefix_cache.hits += len(rest)
    return [done[prepared] for prepared in group]


def _prefill_whole(
    pruner: Pruner, group: Sequence[PreparedRequest], encoder_cache: EncoderCache | None
) -> list[Prefilled]:
    """Encodes, selects, re-packs and reads whole prompts."""
    encoded, looked_up = None, frozenset[int]()
    if encoder_cache is not None and group[0].images_hash:
        encoded, looked_up = _encode(pruner, group, encoder_cache)
    inputs = _collate(pruner, group, without=() if encoded is None else _PIXELS)
    packed = pruner.prepare(
        inputs,
        [prepared.resolved for prepared in group],
        [prepared.request.prompt for prepared in group],
        encoded=encoded,
    )
    arguments = dict(packed.inputs)
    if "position_ids" not in arguments:  # text only: nothing was pruned, positions are the prompt's
        arguments["position_ids"] = _without_single_row(pruner.adapter.positions(inputs))
    ids_BL = arguments["input_ids"]
    if "inputs_embeds" in arguments:  # ids only give the prompt's length then, as in `generate`
        del arguments["input_ids"]
    cache = DynamicCache()
    stages = packed.stages
    with nullcontext() if stages is None else StageDriver(pruner.adapter, stages):
        output = pruner.model(**arguments, past_key_values=cache, use_cache=True, logits_to_keep=1)
    position_ids = arguments["position_ids"]
    last_RB = position_ids.view(-1, *position_ids.shape[-2:])[..., -1]
    next_BR = (last_RB.T + 1).tolist()
    results = []
    for row, report in enumerate(packed.reports):
        real_L = arguments["attention_mask"][row].bool()
        # Padding is on the left, at every layer.
        spans = [slice(-length, None) for length in report.layer_tokens]
        results.append(
            Prefilled(
                logits_V=output.logits[row, -1],
                ids=ids_BL[row, real_L].tolist(),
                positions=next_BR[row],
                keys=[la.keys[row, :, at] for la, at in zip(cache.layers, spans, strict=True)],
                values=[la.values[row, :, at] for la, at in zip(cache.layers, spans, strict=True)],
                report=report,
                images_cached=row in looked_up,
            )
        )
    return results


def _cut_prefix(prefilled: Prefilled, suffix_tokens: int) -> Prefix:
    """The prefix of a prompt: all of it but its last `suffix_tokens` tokens."""
    length = len(prefilled.ids) - suffix_tokens
    return Prefix(
        keys=[key[:, :length] for key in prefilled.keys],
        values=[value[:, :length] for value in prefilled.values],
        ids=prefilled.ids[:length],
        positions=[position - suffix_tokens for position in prefilled.positions],
        report=prefilled.report,
        suffix_tokens=suffix_tokens,
    )


def _prefill_suffixes(
    pruner: Pruner, group: Sequence[PreparedRequest], prefixes: Sequence[Prefix]
) -> list[Prefilled]:
    """Reads the suffixes of prompts whose prefixes are given, both padded on the left."""
    suffixes = [prepared.inputs["input_ids"][0, -prepared.suffix_tokens :] for prepared in group]
    prefix_length = max(len(prefix.ids) for prefix in prefixes)
    suffix_length = max(map(len, suffixes))
    cache = DynamicCache()
    for layer in range(len(prefixes[0].keys)):
        keys = [_left_padded(prefix.keys[layer], prefix_length) for prefix in prefixes]
        values = [_left_padded(prefix.values[layer], prefix_length) for prefix in prefixes]
        cache.update(torch.stack(keys), torch.stack(values), layer)
    mask_BL = torch.zeros(len(group), prefix_length + suffix_length, dtype=torch.int64)
    rows = len(prefixes[0].positions)
    positions_BRS = torch.zeros(len(group), rows, suffix_length, dtype=torch.int64)
    for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        mask_BL[row, prefix_length - len(prefix.ids) : prefix_length] = 1
        mask_BL[row, -len(suffix) :] = 1
        first_R1 = torch.tensor(prefix.positions)[:, None]
        positions_BRS[row, :, -len(suffix) :] = first_R1 + torch.arange(len(suffix))
    prompts = [{"input_ids": suffix[None]} for suffix in suffixes]
    ids_BS = collate(prompts, pruner.pad_id)["input_ids"]
    device = pruner.model.device
    output = pruner.model(
        input_ids=ids_BS.to(device),
        attention_mask=mask_BL.to(device),
        position_ids=_without_single_row(positions_BRS.transpose(0, 1)).to(device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )

    def join(states_BHLW: Tensor, row: int) -> Tensor:
        held = len(prefixes[row].ids)
        prefix_HLW = states_BHLW[row, :, prefix_length - held : prefix_length]
        return torch.cat([prefix_HLW, states_BHLW[row, :, -len(suffixes[row]) :]], dim=1)

    return [
        Prefilled(
            logits_V=output.logits[row, -1],
            ids=prefix.ids + suffix.tolist(),
            positions=[position + len(suffix) for position in prefix.positions],
            keys=[join(layer.keys, row) for layer in cache.layers],
            values=[join(layer.values, row) for layer in cache.layers],
            report=prefix.report_for(len(suffix)),
            suffix_tokens=len(suffix),
        )
        for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True))
    ]


def _without_single_row(positions_RBS: Tensor) -> Tensor:
    """Position ids as models take them: [B, S] with one row, [R, B, S] with several."""
    return positions_RBS[0] if len(positions_RBS) == 1 else positions_RBS


def _left_padded(states_HLW: Tensor, length: int) -> Tensor:
    return pad(states_HLW, (0, 0, length - states_HLW.shape[1], 0))


def _encode(
    pruner: Pruner, group: Sequence[PreparedRequest], encoder_cache: EncoderCache
) -> tuple[Encoded, frozenset[int]]:
    """The encoded images of a group, those that the cache lacks through the tower together; and the
    prompts whose images did not go through it."""
    looked_up = set(range(len(group)))

    def encode(missing: Sequence[int], signals: frozenset[str]) -> Encoded:
        looked_up.difference_update(missing)
        inputs = _collate(pruner, [group[i] for i in missing])
        return pruner.adapter.encode(inputs, signals)

    encoded = encoder_cache.get_or_encode(
        [prepared.images_hash for prepared in group],
        [pruner.signals([prepared.resolved]) for prepared in group],
        encode,
    )
    return encoded, frozenset(looked_up)


def _collate(
    pruner: Pruner, group: Sequence[PreparedRequest], *, without: Collection[str] = ()
) -> dict[str, Tensor]:
    """The group's tensors on the model's device, except the entries named `without`."""
    prompts = [
        {name: value for name, value in prepared.inputs.items() if name not in without}
        for prepared in group
    ]
    batch = collate(prompts, pruner.pad_id)
    return {name: value.to(pruner.model.device) for name, value in batch.items()}
