"""Extracts one prompt with its images from a batch, for every family's pixel layout."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sppruner.adapters import Adapter

_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")
_STACKED_BY_PROMPT = ("idefics3", "smolvlm")


def one_row(adapter: Adapter, inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """The inputs of prompt `row` only. Its padding stays, so that its length is the batch's."""
    extracted = {name: inputs[name][row : row + 1] for name in _PER_TOKEN if name in inputs}
    shapes = adapter.shapes(inputs)
    own = [i for i, (at, _) in enumerate(shapes) if at == row]
    if not own:
        return extracted
    first, last = own[0], own[-1] + 1
    images = len(shapes)
    # In the other families pixels are stacked by image, by tile or by patch.
    sizes = [
        [1] * images,
        [shape.tiles for _, shape in shapes],
        [shape.tiles * shape.rows * shape.columns for _, shape in shapes],
    ]
    for name, value in inputs.items():
        if name in _PER_TOKEN:
            continue
        if adapter.capabilities.family in _STACKED_BY_PROMPT:
            extracted[name] = value[row : row + 1]
            continue
        size = next(s for s in sizes if sum(s) == value.shape[0])
        extracted[name] = value[sum(size[:first]) : sum(size[:last])]
    return extracted
