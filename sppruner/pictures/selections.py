"""The selections that a picture shows: chosen anew for a prompt, or read off a report's mask.

Shapes: N visual tokens, K kept tokens, P tokens of one plane.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from sppruner.errors import InputError
from sppruner.prompts import build_inputs
from sppruner.pruner import Prepared, Pruner
from sppruner.spec import PruneSpec
from sppruner.types import Selection, VisualTokens


def prepare_image(
    pruner: Pruner, processor: Any, image: Image.Image, prompt: str, spec: PruneSpec
) -> Prepared:
    """One image encoded and its tokens selected for a prompt. Raises SpprunerError.

    Its `selections` are (tokens, selection) of each plane. Tokens that a method drops inside the
    decoder still enter it, and count as kept.
    """
    inputs = build_inputs(processor, [prompt], [image]).to(pruner.model.device)
    return pruner.prepare(inputs, spec, [prompt])


def selections_from_report(
    prepared: Prepared, kept_tokens: bytes
) -> list[tuple[VisualTokens, Selection]]:
    """(tokens, selection) of each plane of one prompt, from a `PruneReport.kept_tokens` instead of
    the pruner's own selection. The mask holds neither which tokens are focus nor which are merged.

    Raises InputError if the mask is for another number of tokens.
    """
    count = sum(image.count for image in prepared.images)
    if len(kept_tokens) != -(-count // 8):
        raise InputError(
            f"{len(kept_tokens)} bytes of kept tokens do not match {count} visual tokens: give "
            "those of the same image and model"
        )
    bits_N = np.unpackbits(np.frombuffer(kept_tokens, np.uint8), count=count, bitorder="little")
    per_image = torch.split(torch.from_numpy(bits_N), [image.count for image in prepared.images])
    return [
        (plane, Selection(index_K=kept_N[place_P.cpu()].nonzero().flatten()))
        for image, kept_N in zip(prepared.images, per_image, strict=True)
        for plane, place_P in zip(image.planes, image.places, strict=True)
    ]
