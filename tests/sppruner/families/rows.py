"""One prompt cut out of a batch, with its images, whatever a family's pixels look like."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sppruner.adapters import Adapter

_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")
_STACKED_BY_PROMPT = ("idefics3", "smolvlm")


def one_row(adapter: Adapter, inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """The inputs of prompt `row` alone; its padding stays, so that lengths are the batch's."""
    alone = {name: inputs[name][row : row + 1] for name in _PER_TOKEN if name in inputs}
    shapes = adapter.shapes(inputs)
    mine = [i for i, (at, _) in enumerate(shapes) if at == row]
    if not mine:
        return alone
    first, last = mine[0], mine[-1] + 1
    images = len(shapes)
    # Elsewhere pixels are stacked by image, by tile or by patch.
    sizes = [
        [1] * images,
        [shape.tiles for _, shape in shapes],
        [shape.tiles * shape.rows * shape.columns for _, shape in shapes],
    ]
    for name, value in inputs.items():
        if name in _PER_TOKEN:
            continue
        if adapter.capabilities.family in _STACKED_BY_PROMPT:
            alone[name] = value[row : row + 1]
            continue
        size = next(s for s in sizes if sum(s) == value.shape[0])
        alone[name] = value[sum(size[:first]) : sum(size[:last])]
    return alone
