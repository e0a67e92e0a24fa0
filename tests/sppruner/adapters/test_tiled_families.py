"""Families that cut images into tiles: planes fill their run, signals and shapes equal the model's,
and costs are exact to the multiply-add."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Idefics3Config,
    InternVLConfig,
    LlavaNextConfig,
    MixtralConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMConfig,
)

from sppruner import Budget, Pruner, PruneSpec
from sppruner.adapters import Adapter, Encoded, adapter_class, adapter_for, capabilities, cost_of
from sppruner.adapters.base import raster
from sppruner.cost import SiglipTowerCost
from sppruner.errors import InputError, UnsupportedModel
from sppruner.signals import CONTENT_SEED
from tests.sppruner.families import FAMILIES

TILED = ["llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm"]
MIXED = [1, 2, 0, 3]

families = pytest.mark.parametrize("family", TILED)


@functools.cache
def adapter_of(family: str, attention: str = "sdpa") -> Adapter:
    return adapter_for(FAMILIES[family].build(attention))


@functools.cache
@torch.no_grad()
def encoded_of(family: str) -> Encoded:
    adapter = adapter_of(family)
    return adapter.encode(FAMILIES[family].batch(MIXED), adapter.capabilities.signals)


@families
def test_planes_are_full_rectangles_with_the_tokens_at_their_places(family: str) -> None:
    for image in encoded_of(family).images:
        assert len(image.planes) == len(image.places)
        for number, (plane, places_N) in enumerate(zip(image.planes, image.places, strict=True)):
            assert (plane.row, plane.image, plane.plane) == (image.row, image.image, number)
            assert plane.coords_N2.equal(raster(*plane.grid, torch.device("cpu")))
            assert plane.features_ND.equal(image.run_ND[places_N])
        inside = torch.cat(image.places)
        assert len(inside) == len(set(inside.tolist())), "no token is in two planes"
        assert inside.max() < image.count == image.shape.tokens


@families
def test_images_are_numbered_within_their_prompts_and_their_runs_are_the_model_s(
    family: str,
) -> None:
    adapter, encoded = adapter_of(family), encoded_of(family)
    owners = [(image.row, image.image) for image in encoded.images]
    assert owners == [(0, 0), (1, 0), (1, 1), (3, 0), (3, 1), (3, 2)]
    inputs = dict(FAMILIES[family].batch(MIXED))
    inputs.pop("input_ids"), inputs.pop("attention_mask")
    with torch.no_grad():
        plain = adapter.model.model.get_image_features(**inputs, return_dict=True).pooler_output
    expected = torch.cat([part.flatten(0, -2) for part in plain])
    assert torch.cat([image.run_ND for image in encoded.images]).equal(expected)


@families
def test_shapes_are_known_without_the_encoder(family: str) -> None:
    adapter, inputs = adapter_of(family), FAMILIES[family].batch(MIXED)
    found = [(image.row, image.shape) for image in encoded_of(family).images]
    assert adapter.shapes(inputs) == found
    assert adapter.shapes(FAMILIES[family].batch([0, 0])) == []


@pytest.mark.parametrize("family", [f for f in TILED if f != "llava_onevision"])
@torch.no_grad()
def test_hidden_states_project_to_the_features_one_by_one(family: str) -> None:
    adapter = adapter_of(family)
    assert adapter.capabilities.hidden
    for image in encoded_of(family).images:
        for plane in image.planes:
            assert plane.hidden_NV is not None
            projected = adapter.project(plane.hidden_NV)
            torch.testing.assert_close(projected, plane.features_ND, atol=1e-4, rtol=1e-4)
            some = torch.tensor([plane.count - 1, 0])
            single = adapter.project(plane.hidden_NV[some])
            torch.testing.assert_close(single, plane.features_ND[some], atol=1e-4, rtol=1e-4)


@families
@torch.no_grad()
def test_only_requested_signals_are_read_and_features_do_not_change(family: str) -> None:
    adapter, inputs = adapter_of(family), FAMILIES[family].batch(MIXED)
    plain = adapter.encode(inputs, frozenset())
    for image, probed in zip(plain.images, encoded_of(family).images, strict=True):
        assert image.run_ND.equal(probed.run_ND)
        assert not any(plane.signals for plane in image.planes)
        for plane in probed.planes:
            assert plane.signals.keys() == adapter.capabilities.signals
            sized = {name: len(v) for name, v in plane.signals.items() if name != CONTENT_SEED}
            assert set(sized.values()) == {plane.count}


@families
def test_every_plane_has_its_own_content_seed(family: str) -> None:
    planes = [plane for image in encoded_of(family).images for plane in image.planes]
    seeds = [int(plane.signals[CONTENT_SEED]) for plane in planes]
    assert len(set(seeds)) == len(seeds)


@families
@torch.no_grad()
def test_signals_of_an_image_do_not_depend_on_its_batch(family: str) -> None:
    adapter = adapter_of(family)
    single = adapter.encode(FAMILIES[family].batch([1]), adapter.capabilities.signals).images[0]
    # The first image of a batch and its pixels do not depend on the others, except for its tiles.
    batch = FAMILIES[family].batch([1])
    widened = dict(batch)
    if batch["pixel_values"].dim() == 5:
        zeros = torch.zeros_like(batch["pixel_values"])
        widened["pixel_values"] = torch.cat([batch["pixel_values"], zeros], dim=1)
    if "pixel_attention_mask" in batch:
        none = torch.zeros_like(batch["pixel_attention_mask"])
        widened["pixel_attention_mask"] = torch.cat([batch["pixel_attention_mask"], none], dim=1)
    again = adapter.encode(widened, adapter.capabilities.signals).images[0]
    for one, other in zip(single.planes, again.planes, strict=True):
        for name, values in one.signals.items():
            assert other.signals[name].equal(values)


@families
@given(tokens=st.integers(0, 100), images=st.lists(st.integers(0, 2), min_size=1, max_size=3))
@settings(max_examples=12, deadline=None)
def test_every_image_keeps_exactly_its_budget_and_features_follow(
    family: str, tokens: int, images: list[int]
) -> None:
    spec = PruneSpec(method="grid", budget=Budget(tokens=tokens))
    adapter, inputs = adapter_of(family), FAMILIES[family].batch(images)
    prepared = Pruner(adapter.model).prepare(inputs, spec)
    sizes = adapter.shapes(inputs)
    for row, report in enumerate(prepared.reports):
        mine = [shape.tokens for at, shape in sizes if at == row]
        assert report.visual_tokens == sum(mine)
        assert report.visual_tokens_kept == sum(min(n, tokens) for n in mine)
    in_prompt = (prepared.inputs["input_ids"] == FAMILIES[family].image_id).sum(dim=1).tolist()
    assert in_prompt == [report.visual_tokens_kept for report in prepared.reports]


@families
def test_packed_outputs_are_fresh_and_hold_the_kept_features_image_by_image(family: str) -> None:
    adapter, inputs = adapter_of(family), FAMILIES[family].batch(MIXED)
    pruner = Pruner(adapter.model)
    spec = PruneSpec(method="grid", budget=Budget(ratio=0.3))
    first, second = (pruner.prepare(inputs, spec).inputs for _ in range(2))
    if family == "internvl":
        assert "mm_encoder_outputs" not in first
        assert first["inputs_embeds"].equal(second["inputs_embeds"])
        return
    one, two = first["mm_encoder_outputs"]["image"], second["mm_encoder_outputs"]["image"]
    assert one is not two
    assert [len(part) for part in adapter.packed_features(one)] == [
        spec.budget.count(image.count) for image in encoded_of(family).images
    ]


@families
def test_encoder_costs_equal_the_flop_counter(family: str) -> None:
    adapter = adapter_of(family, "eager")  # The counter knows no fused attention on a CPU.
    inputs = FAMILIES[family].batch(MIXED)
    cost = cost_of(adapter.model.config).encoder
    shapes = [shape for _, shape in adapter.shapes(inputs)]
    parts = adapter.model.model
    tower = parts.vision_model if hasattr(parts, "vision_model") else parts.vision_tower
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        adapter.encode(inputs, frozenset())
    counted = counter.get_flop_counts()
    by_module = {name: sum(flops.values()) for name, flops in counted.items()}
    vision = by_module[next(n for n in by_module if n.endswith(type(tower).__name__))]
    assert sum(map(cost.vision, shapes)) == vision
    assert sum(map(cost.projector, shapes)) == by_module["Global"] - vision


@families
def test_the_modelled_cost_of_a_pruned_generation_is_the_counted_one(family: str) -> None:
    adapter = adapter_of(family, "eager")
    model, inputs = adapter.model, FAMILIES[family].batch([2])
    spec = PruneSpec(method="grid", budget=Budget(ratio=0.25))
    pruner = Pruner(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        done = pruner.generate(inputs, spec, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    report = done.reports[0]
    row = adapter.cost().row(
        images=report.image_shapes,
        layer_tokens=report.layer_tokens,
        prompt_tokens_dense=report.prompt_tokens_dense,
        new_tokens=4,
        pruner_flops=0,
    )
    assert sum(row.flops.values()) == counter.get_total_flops()


def test_a_pooling_head_whose_output_is_unused_is_counted() -> None:
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        attn_implementation="eager",
    )
    tower, pixels = SiglipVisionModel(vision).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(pixel_values=pixels)
    assert 2 * SiglipTowerCost.from_config(vision).forward(16) == counter.get_total_flops()


@families
def test_prompts_that_do_not_fit_their_images_are_refused_with_the_numbers(family: str) -> None:
    adapter, inputs = adapter_of(family), FAMILIES[family].batch([1, 1])
    without = dict(inputs)
    without["input_ids"] = inputs["input_ids"].clone()
    without["input_ids"][1] = 20
    with pytest.raises(InputError, match=r"is there one image placeholder per image|have places"):
        adapter.encode(without, frozenset())
    cut = inputs | {"input_ids": inputs["input_ids"][:, :-12]}
    with pytest.raises(InputError):
        adapter.encode(cut, frozenset())


def released(config: Any) -> Any:
    """An adapter that knows a released size without its weights."""
    return adapter_class(config)(SimpleNamespace(config=config))


def test_tiles_of_released_sizes_have_the_tokens_their_processors_are_set_to() -> None:
    assert released(InternVLConfig()).layout(1).tokens == InternVLConfig().image_seq_length == 256
    idefics3 = Idefics3Config(vision_config={"image_size": 364, "patch_size": 14})
    assert released(idefics3).layout(1).tokens == 169
    smolvlm = SmolVLMConfig(vision_config={"image_size": 512, "patch_size": 16}, scale_factor=4)
    assert released(smolvlm).layout(1).tokens == 64
    # 2880 patches of five tiles and a newline after each of 48 rows.
    inputs = {"image_sizes": torch.tensor([[672, 672]])}
    (layout,) = released(LlavaNextConfig()).layouts(inputs)
    assert layout.tokens == 2880 + 48


@families
def test_decoders_without_a_cost_model_are_refused_by_name(family: str) -> None:
    config = adapter_of(family).model.config
    changed = type(config)(**(config.to_dict() | {"text_config": MixtralConfig().to_dict()}))
    with pytest.raises(UnsupportedModel, match="mixtral decoder"):
        capabilities(changed)
    assert adapter_class(config) is type(adapter_of(family))
