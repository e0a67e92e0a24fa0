"""Modelled FLOPs and KV bytes equal PyTorch's counts and the papers' figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from sppruner import Budget, Pruner, PruneSpec
from sppruner.adapters import cost_of
from sppruner.adapters.towers import skipping_layers_after
from sppruner.cost import PARTS, DecoderCost, ImageShape, ModelCost, RowCost
from tests.sppruner.families.llava import IMAGE, TOKENS, batch, build

NEW = 5
IMAGE_SHAPE = ImageShape(tiles=1, rows=4, columns=4, tokens=TOKENS)
GREEDY: dict[str, Any] = {"do_sample": False, "suppress_tokens": [2, IMAGE]}


@pytest.fixture(scope="module")
def model() -> Any:
    return build("eager")  # The counter counts 0 for fused attention on a CPU.


@pytest.fixture(scope="module")
def cost(model: Any) -> ModelCost:
    return cost_of(model.config, bytes_per_value=4)


def counted_flops(call: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_tower_and_projector_equal_the_flop_counter(model: Any, cost: ModelCost) -> None:
    pixels = batch([1])["pixel_values"]
    hidden = torch.randn(1, TOKENS, 32)
    vision = model.model.vision_tower
    with skipping_layers_after(vision.encoder.layers, model.config.vision_feature_layer):
        tower = counted_flops(lambda: vision(pixel_values=pixels))
    assert tower == cost.encoder.vision(IMAGE_SHAPE)
    projector = counted_flops(lambda: model.model.multi_modal_projector(hidden))
    assert projector == cost.encoder.projector(IMAGE_SHAPE)


def test_prefill_and_every_decode_step_equal_the_flop_counter(model: Any, cost: ModelCost) -> None:
    ids = torch.randint(6, 64, (1, 23), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config.get_text_config())
    prompt = {"attention_mask": torch.ones_like(ids), "past_key_values": cache}
    prefill = counted_flops(lambda: model(input_ids=ids, logits_to_keep=1, **prompt))
    short = [23] * cost.decoder.layers
    assert prefill == cost.decoder.prefill(short)
    for step in range(1, NEW):
        extended = {"attention_mask": torch.ones(1, 23 + step), "past_key_values": cache}
        flops = counted_flops(lambda extended=extended: model(input_ids=ids[:, :1], **extended))
        assert flops == cost.decoder.decode(short, step + 1) - cost.decoder.decode(short, step)


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_the_row_cost_of_a_pruned_generation_equals_the_flop_counter(
    model: Any, cost: ModelCost, ratio: float
) -> None:
    inputs = batch([1])
    spec = PruneSpec(method="grid", budget=Budget(ratio=ratio))
    pruner = Pruner(model)
    generated: list[Any] = []
    settings = GREEDY | {"return_dict_in_generate": True, "max_new_tokens": NEW}
    total = counted_flops(lambda: generated.append(pruner.generate(inputs, spec, **settings)))
    report, output = generated[0].reports[0], generated[0].output
    row = cost.row(
        images=report.image_shapes,
        layer_tokens=report.layer_tokens,
        prompt_tokens_dense=report.prompt_tokens_dense,
        new_tokens=NEW,
        pruner_flops=0,
    )
    assert sum(row.flops.values()) == total
    cached = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
    assert row.kv_bytes == sum(t.numel() * t.element_size() for pair in cached for t in pair)
    assert (row.flops == row.flops_dense) == (ratio == 1.0)


VICUNA = DecoderCost(
    layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008,
    vocabulary=32064,
)  # fmt: skip


def macs(tokens: int) -> float:
    """Multiply-adds of the layers without the head, in units of 10¹², as the papers print."""
    return (VICUNA.prefill([tokens] * 32) - VICUNA.head) / 2 / 1e12


def test_llava_7b_matches_its_published_figure() -> None:
    assert macs(576) == pytest.approx(3.817, abs=5e-4)


@pytest.mark.parametrize(("tokens", "tera"), [(679, 4.521), (176, 1.145)])
def test_fsr_s_figures_with_text_match_the_nearest_whole_token(tokens: int, tera: float) -> None:
    """The figures are averages over prompts (arXiv 2602.05809), so they match to half a token."""
    assert abs(macs(tokens) - tera) <= (macs(tokens + 1) - macs(tokens)) / 2


def test_a_third_of_the_tokens_saves_the_published_67_percent_without_text() -> None:
    assert 1 - macs(192) / macs(576) == pytest.approx(0.672, abs=5e-4)
    assert 1 - macs(192 + 60) / macs(576 + 60) == pytest.approx(0.610, abs=5e-4)


def layered(*parts: tuple[int, int]) -> float:
    """`macs` of a decoder given as (layers, tokens) parts."""
    tokens = [tokens for layers, tokens in parts for _ in range(layers)]
    return (VICUNA.prefill(tokens) - VICUNA.head) / 2 / 1e12


def test_pruning_inside_the_decoder_matches_the_published_figures() -> None:
    """Without text, as the papers count: PyramidDrop's 1.78T (arXiv 2410.17247). Two steps with an
    average of 192 tokens save as much as 192 tokens before the decoder; FastV with 192 tokens after
    two layers saves less."""
    pyramid = layered((8, 576), (8, 288), (8, 144), (8, 72))
    assert pyramid == pytest.approx(1.777, abs=5e-4)
    assert 1 - pyramid / macs(576) == pytest.approx(0.534, abs=5e-4)
    assert 1 - layered((2, 576), (30, 192)) / macs(576) == pytest.approx(0.630, abs=5e-4)
    assert 1 - layered((16, 288), (16, 96)) / macs(576) == pytest.approx(0.671, abs=5e-4)


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 64))
def test_a_longer_prompt_never_costs_less(one: int, other: int, new: int) -> None:
    short, long = ([n] * 32 for n in sorted((one, other)))
    assert VICUNA.prefill(short) <= VICUNA.prefill(long)
    assert VICUNA.decode(short, new) <= VICUNA.decode(long, new)
    assert VICUNA.kv_bytes(short, new) <= VICUNA.kv_bytes(long, new)


def test_the_first_token_needs_no_decode_step() -> None:
    assert VICUNA.decode([100] * 32, 1) == 0
    assert VICUNA.kv_bytes([100] * 32, 1) == 100 * 512 * 1024  # half a MiB per token in 16 bits


def test_a_row_cost_round_trips_and_counts_the_pruner_for_the_pruned_row_only(
    cost: ModelCost,
) -> None:
    row = cost.row(
        images=[IMAGE_SHAPE] * 2, layer_tokens=[20] * 3, prompt_tokens_dense=40, new_tokens=3,
        pruner_flops=7,
    )  # fmt: skip
    assert RowCost.from_dict(row.to_dict()) == row
    assert tuple(row.flops) == tuple(row.flops_dense) == PARTS
    assert (row.flops["pruner"], row.flops_dense["pruner"]) == (7, 0)
    assert row.flops["vision"] == row.flops_dense["vision"] == 2 * cost.encoder.vision(IMAGE_SHAPE)
    assert row.kv_bytes < row.kv_bytes_dense
