"""Probes read what eager attention computes, change nothing, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sppruner import signals
from sppruner.adapters import Encoded, LlavaAdapter
from sppruner.signals import CLS_ATTENTION, CONTENT_SEED, ClsRowProbe, probing
from sppruner.types import VisualTokens
from tests.sppruner.llava import SIDE, TOKENS, batch, build

LAYERS = [-1, -2, 2]


def planes(encoded: Encoded) -> list[VisualTokens]:
    return [plane for image in encoded.images for plane in image.planes]


def eager_rows(feature_layer: int, pixels: Tensor) -> Tensor:
    """Row 0 of the eager attention map at the feature layer's depth, head mean, CLS column off."""
    tower = build("eager", feature_layer=feature_layer).model.vision_tower
    maps = tower(pixel_values=pixels, output_attentions=True).attentions
    return maps[feature_layer if feature_layer < 0 else feature_layer - 1].mean(dim=1)[:, 0, 1:]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("feature_layer", LAYERS)
def test_the_probe_reads_the_eager_row_of_the_feature_layer(
    attention: str, feature_layer: int
) -> None:
    inputs = batch([1, 2])
    with torch.no_grad():
        adapter = LlavaAdapter(build(attention, feature_layer=feature_layer))
        encoded = adapter.encode(inputs, frozenset({CLS_ATTENTION}))
        expected = eager_rows(feature_layer, inputs["pixel_values"])
    read = torch.stack([image.signals[CLS_ATTENTION] for image in planes(encoded)])
    torch.testing.assert_close(read, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("feature_layer", LAYERS)
@torch.no_grad()
def test_features_are_bit_equal_with_and_without_probing(
    attention: str, feature_layer: int
) -> None:
    model = build(attention, feature_layer=feature_layer)
    inputs = batch([1, 1])
    plain = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    encoded = LlavaAdapter(model).encode(inputs, frozenset({CLS_ATTENTION, CONTENT_SEED}))
    for image, features in zip(planes(encoded), plain.pooler_output, strict=True):
        assert image.features_ND.equal(features)


@pytest.mark.parametrize("feature_layer", LAYERS)
@torch.no_grad()
def test_hidden_states_are_those_the_features_were_projected_from(feature_layer: int) -> None:
    model = build(feature_layer=feature_layer)
    for image in planes(LlavaAdapter(model).encode(batch([2]), frozenset())):
        assert image.hidden_NV is not None
        projected = model.model.multi_modal_projector(image.hidden_NV)
        torch.testing.assert_close(projected, image.features_ND, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_only_what_is_asked_for_is_read() -> None:
    adapter = LlavaAdapter(build())
    assert not planes(adapter.encode(batch([1]), frozenset()))[0].signals
    seeds = planes(adapter.encode(batch([2]), frozenset({CONTENT_SEED})))
    assert seeds[0].signals.keys() == {CONTENT_SEED}
    assert seeds[0].signals[CONTENT_SEED] != seeds[1].signals[CONTENT_SEED]


@torch.no_grad()
def test_tokens_carry_their_place_on_the_grid_in_raster_order() -> None:
    image = planes(LlavaAdapter(build()).encode(batch([1]), frozenset()))[0]
    assert image.grid == (SIDE, SIDE)
    assert image.coords_N2.tolist() == [[i // SIDE, i % SIDE] for i in range(TOKENS)]


def run_tower(model: Any) -> None:
    model.model.vision_tower(pixel_values=batch([1])["pixel_values"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_an_error_under_a_probe_restores_the_implementation(attention: str) -> None:
    model = build(attention)
    tower = model.model.vision_tower
    layers = tower.encoder.layers
    outer, inner = ClsRowProbe(layers[0].self_attn), ClsRowProbe(layers[1].self_attn)
    with pytest.raises(RuntimeError, match="on purpose"), probing(tower, outer):  # noqa: PT012
        with pytest.raises(KeyError), probing(tower, inner):
            raise KeyError("inner")
        run_tower(model)
        raise RuntimeError("on purpose")
    assert tower.config._attn_implementation == attention
    assert model.config.text_config._attn_implementation == attention
    assert not signals._active
    assert outer.rows_IN is not None, "the outer probe reads on after the inner one failed"
    assert inner.rows_IN is None


@torch.no_grad()
def test_probing_one_module_twice_gives_it_back_to_the_outer_probe() -> None:
    model = build()
    tower = model.model.vision_tower
    module = tower.encoder.layers[1].self_attn
    outer, inner = ClsRowProbe(module), ClsRowProbe(module)
    with probing(tower, outer):
        with probing(tower, inner):
            run_tower(model)
        assert inner.rows_IN is not None
        assert outer.rows_IN is None
        run_tower(model)
        assert outer.rows_IN is not None
    assert not signals._active
    assert tower.config._attn_implementation == "sdpa"


def test_an_unknown_implementation_leaves_no_probe_behind() -> None:
    tower = build().model.vision_tower
    tower.config._attn_implementation_internal = "no_such_attention"
    with pytest.raises(KeyError), probing(tower, ClsRowProbe(tower.encoder.layers[0].self_attn)):
        pass
    assert not signals._active
    assert tower.config._attn_implementation == "no_such_attention"


@torch.no_grad()
def test_models_that_are_not_probed_are_not_read() -> None:
    probed, other = build(), build(seed=1)
    tower = probed.model.vision_tower
    probe = ClsRowProbe(tower.encoder.layers[0].self_attn)
    with probing(tower, probe):
        run_tower(other)
        assert probe.rows_IN is None
