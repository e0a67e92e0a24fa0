"""Any-resolution layouts: the processors' own counts at the released sizes, and newline tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaNextConfig, LlavaNextProcessor, LlavaOnevisionConfig
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from sppruner import Budget, Pruner, PruneSpec
from sppruner.adapters import LlavaNextAdapter, LlavaOnevisionAdapter, capabilities
from sppruner.adapters.anyres_layout import AnyresLayout
from sppruner.errors import InputError, UnsupportedModel
from tests.sppruner.families import llava_next, llava_onevision

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


def counted(processor: Any, config: Any, **facts: Any) -> Any:
    """The processor's count of visual tokens for (height, width), without a tokenizer."""
    facts["image_processor"] = SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints)
    instance = SimpleNamespace(**facts)
    instance._get_unpadded_features = lambda *given: processor._get_unpadded_features(
        instance, *given
    )
    tile = config.vision_config.image_size
    return lambda size: processor._get_number_of_features(instance, *size, tile, tile)


@given(size=SIZES)
def test_llava_next_counts_are_the_processor_s(size: tuple[int, int]) -> None:
    config = LlavaNextConfig()
    count = counted(LlavaNextProcessor, config, patch_size=14, num_additional_image_tokens=0)
    layout = AnyresLayout.for_image(size, pinpoints=config.image_grid_pinpoints, tile=336, side=24)
    assert layout.tokens == layout.shape().tokens == count(size)
    assert layout.tiles == image_size_to_num_patches(size, config.image_grid_pinpoints, 336)


@given(size=SIZES)
def test_llava_onevision_counts_are_the_processor_s(size: tuple[int, int]) -> None:
    config = LlavaOnevisionConfig()
    count = counted(
        LlavaOnevisionProcessor, config, num_image_tokens=729, vision_aspect_ratio="anyres_max_9"
    )
    layout = AnyresLayout.for_image(
        size, pinpoints=config.image_grid_pinpoints, tile=384, side=27, most_tiles=9
    )
    assert layout.tokens == layout.shape().tokens == count(size)
    assert layout.tiles == image_size_to_num_patches(size, config.image_grid_pinpoints, 384)


@given(size=SIZES)
def test_places_leave_out_one_newline_at_the_end_of_every_row(size: tuple[int, int]) -> None:
    pinpoints = LlavaNextConfig().image_grid_pinpoints
    layout = AnyresLayout.for_image(size, pinpoints=pinpoints, tile=336, side=24)
    inside = torch.cat(layout.places(torch.device("cpu")))
    newlines = set(range(layout.tokens)) - set(inside.tolist())
    rows, columns = layout.size
    assert newlines == {576 + row * (columns + 1) + columns for row in range(rows)}


def test_a_sliver_without_a_high_resolution_row_has_its_low_resolution_view_only() -> None:
    layout = AnyresLayout.for_image((2, 2000), pinpoints=[[32, 32]], tile=16, side=4)
    assert layout.size == (0, 8)
    assert layout.tokens == 16
    assert len(layout.places(torch.device("cpu"))) == 1
    inputs = llava_next.batch([1])
    # (height, width); padding takes all four of its rows.
    inputs["image_sizes"] = torch.tensor([[2, 2000]])
    inputs["pixel_values"] = torch.randn(1, 4, 3, 16, 16)
    ids_BS = torch.tensor([[1, *[llava_next.IMAGE] * 16, 30, 31]])
    inputs |= {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    with torch.no_grad():
        (image,) = LlavaNextAdapter(llava_next.build()).encode(inputs, frozenset()).images
    assert [plane.grid for plane in image.planes] == [(4, 4)]
    assert image.count == 16


def test_newlines_stay_only_where_the_budget_has_room_beside_all_planes() -> None:
    model, inputs = llava_next.build(), llava_next.batch([1])
    newlines = 8
    run_N = (inputs["input_ids"][0] == llava_next.IMAGE).nonzero().squeeze(1)
    total = len(run_N)
    for spare in (-3, 0, 2, newlines):
        tokens = total - newlines + spare
        spec = PruneSpec(method="grid", budget=Budget(tokens=tokens))
        prepared = Pruner(model).prepare(inputs, spec)
        assert prepared.reports[0].visual_tokens_kept == tokens
        kept_N = prepared.inputs["position_ids"][0]
        ends = run_N[16 + 6 :: 7]
        assert len(ends) == newlines
        assert torch.isin(ends, kept_N).tolist() == [i < spare for i in range(newlines)]


@torch.no_grad()
def test_tiles_in_a_row_are_read_like_tiles_stacked_by_image() -> None:
    adapter, inputs = LlavaNextAdapter(llava_next.build()), llava_next.batch([1, 1])
    counts = [shape.tiles for _, shape in adapter.shapes(inputs)]
    flat = [image[:count] for image, count in zip(inputs["pixel_values"], counts, strict=True)]
    wanted = adapter.capabilities.signals
    stacked = adapter.encode(inputs, wanted).images
    in_a_row = adapter.encode(inputs | {"pixel_values": torch.cat(flat)}, wanted).images
    for one, other in zip(stacked, in_a_row, strict=True):
        assert one.run_ND.equal(other.run_ND)
        for plane, twin in zip(one.planes, other.planes, strict=True):
            assert all(twin.signals[name].equal(plane.signals[name]) for name in wanted)


@torch.no_grad()
def test_prompts_of_several_images_hold_low_resolution_views_and_one_newline_each() -> None:
    ids = [[1, *[5] * 28, 30, 31, 32], [1, *[5] * 17, 30, *[5] * 17, 31]]
    rows = [[0] * (38 - len(row)) + row for row in ids]
    inputs = {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(rows).ne(0).long(),
        "pixel_values": torch.randn(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        "image_sizes": torch.tensor([[7, 5], [40, 20], [48, 48]]),
        "batch_num_images": torch.tensor([1, 2]),
    }
    model = llava_onevision.build()
    images = LlavaOnevisionAdapter(model).encode(inputs, frozenset()).images
    assert [[plane.grid for plane in image.planes] for image in images] == [
        [(4, 4), (4, 2)],
        [(4, 4)],
        [(4, 4)],
    ]
    assert [image.shape.tiles for image in images] == [2, 1, 1]
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [2, 5]}
    plain = model.generate(**inputs, **settings)
    whole = PruneSpec(method="grid", budget=Budget(ratio=1.0))
    kept = Pruner(model).generate(inputs, whole, **settings)
    assert kept.tokens_BT.equal(plain[:, 38:])
    assert [report.visual_tokens_kept for report in kept.reports] == [28, 34]


@pytest.mark.parametrize("images", [[1], [0]])
def test_videos_are_refused_rather_than_dropped(images: list[int]) -> None:
    inputs = llava_onevision.batch(images)
    inputs["input_ids"][0, -2] = llava_onevision.VIDEO
    spec = PruneSpec(method="grid", budget=Budget(ratio=0.5))
    with pytest.raises(InputError, match="videos are not pruned"):
        Pruner(llava_onevision.build()).prepare(inputs, spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-2, -3]}, "concatenates vision layers"),
        ({"vision_feature_layer": 0}, "vision_feature_layer=0 reads the tower's embeddings"),
        ({"vision_feature_select_strategy": "default"}, "load the model with 'full'"),
        ({"vision_aspect_ratio": "square"}, "anyres_max_9"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "siglip_vision_model"),
    ],
)
def test_variants_that_cannot_be_served_say_what_to_load(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        capabilities(LlavaOnevisionConfig(**change))


@pytest.mark.parametrize("family", [llava_next, llava_onevision])
def test_pixels_without_the_images_sizes_are_refused(family: Any) -> None:
    inputs = family.batch([1])
    del inputs["image_sizes"]
    spec = PruneSpec(method="grid", budget=Budget(ratio=0.5))
    with pytest.raises(InputError, match="pass on everything the processor returns"):
        Pruner(family.build()).prepare(inputs, spec)
