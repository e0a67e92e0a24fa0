"""The cost of Qwen's towers and of whole generations equals the FLOP counter's exactly."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers.vision_utils import get_vision_window_index

from sppruner import Budget, Pruner, PruneSpec
from sppruner.adapters import cost_of
from sppruner.cost import ImageShape, QwenEncoderCost
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.qwen2_vl import IMAGE, MERGE, batch

families = pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])


@given(rows=st.integers(1, 13), columns=st.integers(1, 13), side=st.integers(1, 5))
def test_attention_pairs_equal_those_of_the_tower_s_windows(
    rows: int, columns: int, side: int
) -> None:
    _, borders = get_vision_window_index(
        torch.tensor([[1, 2 * rows, 2 * columns]]),
        spatial_merge_size=2,
        window_size=side * 2 * 14,
        patch_size=14,
    )
    windowed = QwenEncoderCost(
        layers=1,
        hidden=1,
        intermediate=0,
        gated=False,
        patch_values=0,
        merge=4,
        width=1,
        windowed_layers=1,
        window=2 * side,
    )
    shape = ImageShape(tiles=1, rows=2 * rows, columns=2 * columns, tokens=rows * columns)
    pairs = sum((stop - start) ** 2 for start, stop in pairwise(borders.tolist()))
    projections = 4 * 2 * shape.rows * shape.columns
    assert windowed.vision(shape) - projections == 4 * pairs


def counted_flops(call: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@families
@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (4, 10), (14, 6), (16, 16), (26, 2)])
def test_tower_and_mergers_equal_the_flop_counter(family: str, grid: tuple[int, int]) -> None:
    model = FAMILIES[family].build("eager")
    rows, columns = grid
    shape = ImageShape(tiles=1, rows=rows, columns=columns, tokens=rows * columns // MERGE**2)
    tower, encoder = model.model.visual, cost_of(model.config).encoder
    pixels, grids = torch.randn(rows * columns, 96), torch.tensor([[1, rows, columns]])
    total = counted_flops(lambda: tower(pixels, grid_thw=grids))
    assert total == encoder.vision(shape) + encoder.projector(shape)
    states = torch.randn(rows * columns, 32)
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", [])]
    assert sum(counted_flops(lambda m=m: m(states)) for m in mergers) == encoder.projector(shape)


@families
@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_the_row_cost_of_a_pruned_generation_equals_the_flop_counter(
    family: str, ratio: float
) -> None:
    model = FAMILIES[family].build("eager")
    pruner = Pruner(model)
    spec = PruneSpec(method="grid", budget=Budget(ratio=ratio))
    settings: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "suppress_tokens": [2, IMAGE],
    }
    generated: list[Any] = []
    total = counted_flops(lambda: generated.append(pruner.generate(batch([2]), spec, **settings)))
    report = generated[0].reports[0]
    row = pruner.adapter.cost().row(
        images=report.image_shapes,
        layer_tokens=report.layer_tokens,
        prompt_tokens_dense=report.prompt_tokens_dense,
        new_tokens=4,
        pruner_flops=0,
    )
    assert sum(row.flops.values()) == total
