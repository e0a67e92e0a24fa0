"""Features of Qwen's families: windows, merged patches, M-RoPE, DeepStack, exact costs. The matrix
of `test_equivalence.py` covers them as well."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Qwen3VLMoeConfig
from transformers.vision_utils import get_vision_window_index

from sppruner import Budget, Pruner, PruneSpec
from sppruner.adapters import adapter_for, capabilities
from sppruner.adapters.qwen_vl import _window_order
from sppruner.errors import InputError, MissingSignal, UnsupportedModel
from sppruner.pruner import check_spec
from sppruner.signals import ATTENTION, CONTENT_SEED, KEYS, RECEIVED_ATTENTION
from sppruner.spec import DENSE
from sppruner.types import VisualTokens
from tests.sppruner.families import FAMILIES, qwen2_5_vl, qwen2_vl, qwen3_vl
from tests.sppruner.families.qwen2_vl import END, GRIDS, IMAGE, MERGE, START, VIDEO, batch

MIXED = [1, 2, 0, 1]
families = pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
SIGNALS = frozenset({ATTENTION, RECEIVED_ATTENTION, KEYS, CONTENT_SEED})


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def planes_of(model: Any, inputs: dict[str, Tensor]) -> list[VisualTokens]:
    images = adapter_for(model).encode(inputs, SIGNALS).images
    assert all(len(image.planes) == 1 for image in images)
    return [image.planes[0] for image in images]


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def eager_saliency(model: Any, block: int, inputs: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """For each image, by token in the order of the tower: the attention its patches receive in
    `block`, their mean key, and their pre-merger states. From queries and keys recomputed here."""
    tower = model.model.visual
    seen: dict[str, Any] = {}

    def remember(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, states=args[0] if args else kwargs["hidden_states"])

    hook = tower.blocks[block].attn.register_forward_pre_hook(remember, with_kwargs=True)
    grids = inputs["image_grid_thw"]
    last = tower(inputs["pixel_values"], grid_thw=grids, return_dict=True).last_hidden_state
    hook.remove()
    attention = tower.blocks[block].attn
    query_PHD, key_PHD, _ = (
        attention.qkv(seen["states"]).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    )
    cos, sin = seen["position_embeddings"]
    query_PHD, key_PHD = rotated(query_PHD, cos, sin), rotated(key_PHD, cos, sin)
    found: list[tuple[Tensor, ...]] = []
    borders = [0, *grids.prod(dim=1).cumsum(0).tolist()]
    for start, stop in pairwise(borders):
        scores_HPP = torch.einsum("qhd,khd->hqk", query_PHD[start:stop], key_PHD[start:stop])
        received_P = torch.softmax(scores_HPP * attention.scaling, dim=-1).mean(dim=(0, 1))
        received_N = received_P.reshape(-1, MERGE**2).mean(dim=1)
        key_PD = key_PHD[start:stop].mean(dim=1)
        key_ND = key_PD.reshape(-1, MERGE**2, key_PD.shape[1]).mean(dim=1)
        found.append((received_N, key_ND, last[start:stop]))
    return found


BLOCKS = {"qwen2_vl": 2, "qwen2_5_vl": 1, "qwen3_vl": 2}


@families
@attentions
def test_saliency_is_what_each_tokens_patches_receive_in_the_last_full_attention_block(
    family: str, attention: str
) -> None:
    """Features match tokens between the tower's order and raster order: a token of the tower has
    the features that the merger computes from it."""
    inputs = batch(MIXED)
    expected = eager_saliency(FAMILIES[family].build("eager"), BLOCKS[family], inputs)
    model = FAMILIES[family].build(attention)
    orders = []
    for plane, (received_N, keys_NV, states_PV) in zip(
        planes_of(model, inputs), expected, strict=True
    ):
        merged_ND = model.model.visual.merger(states_PV)
        distance_NN = torch.cdist(plane.features_ND, merged_ND)
        order_N = distance_NN.argmin(dim=1)
        assert distance_NN.min(dim=1).values.max() < 1e-2 * distance_NN.median()
        assert sorted(order_N.tolist()) == list(range(plane.count))
        orders.append(order_N.tolist())
        for name in (ATTENTION, RECEIVED_ATTENTION):
            torch.testing.assert_close(plane.signals[name], received_N[order_N], atol=1e-6, rtol=0)
        torch.testing.assert_close(plane.signals[KEYS], keys_NV[order_N], atol=2e-4, rtol=1e-4)
    windowed = any(order != sorted(order) for order in orders)
    assert windowed == (family == "qwen2_5_vl")


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Flash attention of images packed into one sequence."""
    sizes = kwargs["cu_seq_lens_q"].diff().tolist()
    parts = zip(*(torch.split(states, sizes, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat(
        [
            nn.functional.scaled_dot_product_attention(q, k, v, scale=kwargs["scaling"])
            for q, k, v in parts
        ],
        dim=2,
    ).transpose(1, 2), None


@families
def test_saliency_is_read_image_by_image_where_the_tower_packs_them(family: str) -> None:
    """Flash attention gets all images in one call, with their borders."""
    AttentionInterface.register("flash_packed_in_test", packed_attention)
    AttentionMaskInterface.register("flash_packed_in_test", lambda *args, **kwargs: None)
    inputs, model = batch(MIXED), FAMILIES[family].build()
    apart = planes_of(model, inputs)
    model.model.visual.config._attn_implementation_internal = "flash_packed_in_test"
    for one, packed in zip(apart, planes_of(model, inputs), strict=True):
        torch.testing.assert_close(packed.features_ND, one.features_ND, atol=1e-3, rtol=1e-4)
        for name in (ATTENTION, KEYS):
            torch.testing.assert_close(
                packed.signals[name], one.signals[name], atol=1e-5, rtol=1e-4
            )


@families
def test_features_are_bit_equal_under_the_probe_and_are_those_of_the_hidden_states(
    family: str,
) -> None:
    inputs, model = batch(MIXED), FAMILIES[family].build()
    plain = model.model.get_image_features(
        inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"], return_dict=True
    )
    adapter = adapter_for(model)
    for plane, features in zip(planes_of(model, inputs), plain.pooler_output, strict=True):
        assert plane.features_ND.equal(features)
        assert plane.hidden_NV is not None
        assert plane.hidden_NV.shape == (plane.count, 32 * MERGE**2)
        projected = adapter.project(plane.hidden_NV)
        torch.testing.assert_close(projected, plane.features_ND, atol=1e-4, rtol=1e-5)
        some = plane.hidden_NV[[plane.count - 1, 0]]
        torch.testing.assert_close(
            adapter.project(some), plane.features_ND[[plane.count - 1, 0]], atol=1e-4, rtol=1e-5
        )
        assert adapter.project(plane.hidden_NV[:0]).shape == (0, 32)


@families
def test_an_image_gives_the_same_signals_in_any_batch(family: str) -> None:
    model = FAMILIES[family].build()
    together = planes_of(model, batch(MIXED))
    assert [plane.grid for plane in together] == [(r // MERGE, c // MERGE) for r, c in GRIDS]
    assert len({int(plane.signals[CONTENT_SEED]) for plane in together}) == len(GRIDS)
    first = planes_of(model, batch([1]))[0]
    # The same generator draws the first image's pixels.
    for name, value in first.signals.items():
        torch.testing.assert_close(together[0].signals[name], value, atol=1e-5, rtol=1e-4)
    assert together[0].signals[CONTENT_SEED] == first.signals[CONTENT_SEED]


@given(rows=st.integers(1, 13), columns=st.integers(1, 13), side=st.integers(1, 5))
def test_the_window_order_is_the_towers_own(rows: int, columns: int, side: int) -> None:
    order_N, _ = get_vision_window_index(
        torch.tensor([[1, 2 * rows, 2 * columns]]),
        spatial_merge_size=2,
        window_size=side * 2 * 14,
        patch_size=14,
    )
    assert _window_order(rows, columns, side, torch.device("cpu")).equal(order_N)


@families
def test_positions_are_text_then_time_height_and_width_of_the_unpruned_prompt(family: str) -> None:
    ids = torch.tensor([[0, 0, 1, START, *[IMAGE] * 6, END, 20, 21]])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    positions_4BS = adapter_for(FAMILIES[family].build()).positions(inputs)
    assert positions_4BS[:, 0].tolist() == [
        [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        [0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],
        [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7],
        [0, 0, 0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],
    ]


@families
def test_token_types_that_are_missing_are_read_from_the_ids(family: str) -> None:
    model, inputs = FAMILIES[family].build(), batch(MIXED)
    spec = PruneSpec(method="topk", budget=Budget(ratio=0.4))
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    given = Pruner(model).generate(inputs, spec, **settings)
    del inputs["mm_token_type_ids"]
    assert Pruner(model).generate(inputs, spec, **settings).tokens_BT.equal(given.tokens_BT)


def test_deepstack_features_keep_the_indices_of_their_tokens() -> None:
    model, inputs = qwen3_vl.build(), batch(MIXED)
    pruner = Pruner(model)
    prepared = pruner.prepare(inputs, PruneSpec(method="topk", budget=Budget(ratio=0.4)))
    packed = prepared.inputs["mm_encoder_outputs"]["image"]
    plain = model.model.get_image_features(
        inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"], return_dict=True
    )
    assert len(packed.deepstack_features) == len(plain.deepstack_features) == 2
    for layer, whole in zip(packed.deepstack_features, plain.deepstack_features, strict=True):
        for i, (_, choice) in enumerate(prepared.selections):
            assert layer[i].equal(whole[i][choice.index_K])
            assert 0 < choice.count < len(whole[i])


def test_stages_start_after_the_last_deepstack_layer() -> None:
    config = qwen3_vl.build().config
    assert capabilities(config).first_prunable_layer == 2
    config.vision_config.deepstack_visual_indexes = [0, 1, 2, 2]
    assert capabilities(config).first_prunable_layer is None
    assert capabilities(qwen2_5_vl.build().config).first_prunable_layer == 1


def test_a_decoder_that_allows_no_stages_gets_none_from_deepstack() -> None:
    config = qwen3_vl.build().config
    config.text_config.sliding_window = 32
    assert capabilities(config).first_prunable_layer is None


@families
def test_positions_cannot_be_renumbered(family: str) -> None:
    spec = PruneSpec(method="grid", budget=Budget(ratio=0.5), positions="renumber")
    with pytest.raises(MissingSignal, match="renumber"):
        check_spec(spec, capabilities(FAMILIES[family].build().config))


def prompt(*runs: int, between: tuple[int, ...] = (END, START)) -> Tensor:
    ids = [1, START, *[IMAGE] * runs[0]]
    for run in runs[1:]:
        ids += [*between, *[IMAGE] * run]
    return torch.tensor([[*ids, END, 20]])


@families
@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        (prompt(6, 12, between=()), [(4, 6), (6, 8)], "in front of every image"),
        (prompt(6, 12), [(6, 8), (4, 6)], "in front of every image"),
        (prompt(6, 6), [(4, 6)], "one image placeholder per image"),
        (prompt(6), [(4, 6), (4, 6)], "2 images were given"),
        (torch.tensor([[1, VIDEO, VIDEO, 20]]), [], "videos are not pruned"),
    ],
)
def test_prompts_that_do_not_fit_their_images_are_refused(
    family: str, ids: Tensor, grids: list[tuple[int, int]], message: str
) -> None:
    """Images without a token between them would silently share one run of M-RoPE positions."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if grids:
        inputs["pixel_values"] = torch.randn(sum(r * c for r, c in grids), 96)
        inputs["image_grid_thw"] = torch.tensor([(1, *grid) for grid in grids])
    pruner = Pruner(FAMILIES[family].build())
    for spec in (DENSE, PruneSpec(method="grid", budget=Budget(ratio=0.5))):
        with pytest.raises(InputError, match=message):
            pruner.generate(inputs, spec)


def test_images_of_several_frames_are_refused() -> None:
    inputs = batch([1])
    inputs["image_grid_thw"][0, 0] = 2
    with pytest.raises(InputError, match="2 frames"):
        adapter_for(qwen2_vl.build()).shapes(inputs)


def test_variants_that_cannot_be_served_are_refused() -> None:
    config = qwen2_vl.build().config
    config.text_config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(UnsupportedModel, match="use_sliding_window=False"):
        capabilities(config)
    config = qwen2_5_vl.build().config
    config.vision_config.fullatt_block_indexes = []
    with pytest.raises(UnsupportedModel, match="fullatt_block_indexes"):
        capabilities(config)
    with pytest.raises(UnsupportedModel, match="qwen3_vl_moe"):
        capabilities(Qwen3VLMoeConfig())
