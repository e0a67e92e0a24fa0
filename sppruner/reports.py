"""Proof of pruning: reports counted on the model's input tensors and checked against the budget.

Shapes: B batch rows, S length of the processor's prompts, L length of the packed prompts, N visual
tokens of one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from sppruner.adapters import Adapter, EncodedImage
from sppruner.compact import Compacted
from sppruner.errors import InputError, PruningHadNoEffect
from sppruner.spec import PruneSpec
from sppruner.stages import TokenSchedule
from sppruner.types import PruneReport


def dense_reports(
    adapter: Adapter, specs: Sequence[PruneSpec], inputs: Mapping[str, Tensor]
) -> list[PruneReport]:
    """One report per prompt of a batch that the model reads unchanged.

    Raises InputError for image placeholders without any image: some families would answer from the
    placeholder's own embedding.
    """
    visual_B = adapter.placeholders(inputs["input_ids"]).sum(dim=1).tolist()
    length_B = inputs["attention_mask"].sum(dim=1).tolist()
    shapes = adapter.shapes(inputs)
    if inputs.get("pixel_values") is None:
        for row, visual in enumerate(visual_B):
            if visual:
                raise InputError(
                    f"prompt {row} has places for {visual} visual tokens, no image was given: pass "
                    "the processor's pixel_values, or remove the image placeholders"
                )
    layers = adapter.capabilities.decoder_layers
    return [
        PruneReport(
            spec=spec,
            visual_tokens=visual,
            visual_tokens_kept=visual,
            kept_tokens=pack_bits(np.ones(visual, dtype=bool)),
            prompt_tokens=length,
            prompt_tokens_dense=length,
            layer_tokens=(length,) * layers,
            image_shapes=tuple(shape for at, shape in shapes if at == row),
        )
        for row, (spec, visual, length) in enumerate(zip(specs, visual_B, length_B, strict=True))
    ]


def pruned_reports(
    adapter: Adapter,
    specs: Sequence[PruneSpec],
    inputs: Mapping[str, Tensor],
    *,
    keep_BS: Tensor,
    compacted: Compacted,
    images: Sequence[EncodedImage],
    schedules: Sequence[TokenSchedule],
    features: Sequence[Tensor],
    selection_flops: Sequence[int],
) -> list[PruneReport]:
    """One report per prompt, counted on what the model will read and checked against its schedule.

    keep_BS: True for the tokens of `inputs` that the packed prompts hold. features: of each image,
    as packed. selection_flops: of each image. Raises PruningHadNoEffect where prompt, mask and
    features do not all hold the scheduled tokens: a row must never be called pruned when the model
    read something else.
    """
    visual_BS = adapter.placeholders(inputs["input_ids"]).cpu().numpy()
    kept_BS = keep_BS.cpu().numpy()
    before_B = visual_BS.sum(axis=1).tolist()
    length_B = inputs["attention_mask"].sum(dim=1).tolist()
    after_B = adapter.placeholders(compacted.input_ids_BL).sum(dim=1).tolist()
    short_B = compacted.attention_mask_BL.sum(dim=1).tolist()
    layers, decoder = adapter.capabilities.decoder_layers, adapter.cost().decoder
    reports = []
    for row, spec in enumerate(specs):
        own = [i for i, image in enumerate(images) if image.row == row]
        due = sum(schedules[i].before for i in own)
        packed = sum(int(features[i].shape[0]) for i in own)
        mask_N = kept_BS[row, visual_BS[row]]
        marked = int(mask_N.sum())
        if not after_B[row] == marked == packed == due:
            raise PruningHadNoEffect(
                f"prompt {row}: {spec.method} was to leave {due} of {before_B[row]} visual tokens; "
                f"the prompt holds {after_B[row]}, the mask {marked}, the encoder output {packed}"
            )
        text = short_B[row] - due
        layer_tokens = tuple(
            text + sum(schedules[i].at(layer) for i in own) for layer in range(layers)
        )
        stage_scored = any(schedules[i].scoring == "stage" for i in own)
        reports.append(
            PruneReport(
                spec=spec,
                visual_tokens=before_B[row],
                visual_tokens_kept=sum(schedules[i].counted for i in own),
                kept_tokens=pack_bits(mask_N),
                prompt_tokens=short_B[row],
                prompt_tokens_dense=length_B[row],
                layer_tokens=layer_tokens,
                image_shapes=tuple(images[i].shape for i in own),
                selection_flops=sum(selection_flops[i] for i in own)
                + (decoder.scoring(layer_tokens) if stage_scored else 0),
            )
        )
    return reports


def pack_bits(kept_N: np.ndarray) -> bytes:
    """A mask of visual tokens as `PruneReport.kept_tokens`."""
    return np.packbits(kept_N, bitorder="little").tobytes()
