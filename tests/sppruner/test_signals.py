"""Probes read what eager attention computes, change no result and leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Idefics3VisionConfig,
    set_seed,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from sppruner import signals
from sppruner.adapters import Encoded, LlavaAdapter
from sppruner.signals import (
    ATTENTION,
    CLS_ATTENTION,
    CONTENT_SEED,
    KEYS,
    RECEIVED_ATTENTION,
    ClsRowProbe,
    ReceivedProbe,
    probing,
)
from sppruner.types import VisualTokens
from tests.sppruner.families.llava import SIDE, TOKENS, batch, build

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
def test_only_requested_signals_are_read() -> None:
    adapter = LlavaAdapter(build())
    assert not planes(adapter.encode(batch([1]), frozenset()))[0].signals
    seeds = planes(adapter.encode(batch([2]), frozenset({CONTENT_SEED})))
    assert seeds[0].signals.keys() == {CONTENT_SEED}
    assert seeds[0].signals[CONTENT_SEED] != seeds[1].signals[CONTENT_SEED]


@torch.no_grad()
def test_tokens_have_their_grid_coordinates_in_raster_order() -> None:
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
def test_an_inner_probe_of_the_same_module_restores_the_outer_one() -> None:
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


def test_an_unknown_implementation_leaves_no_active_probe() -> None:
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


def eager_map(query_IHND: Tensor, key_IHND: Tensor, mask: Tensor | None) -> Tensor:
    """[I, H, N, N] by the definition."""
    key_IHND = key_IHND.repeat_interleave(query_IHND.shape[1] // key_IHND.shape[1], dim=1)
    scores = query_IHND @ key_IHND.transpose(-1, -2) * 0.3
    return torch.softmax(scores if mask is None else scores + mask, dim=-1)


@given(
    images=st.integers(1, 3),
    groups=st.integers(1, 2),
    group=st.integers(1, 3),
    tokens=st.integers(1, 9),
    form=st.sampled_from(["none", "bool", "additive", "flash"]),
    at_a_time=st.sampled_from([1, 30, 2**24]),
)
def test_received_attention_is_the_column_mean_of_the_eager_map(
    images: int, groups: int, group: int, tokens: int, form: str, at_a_time: int
) -> None:
    """For any chunk size, with grouped keys and every form of mask."""
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(images, groups * group, tokens, 4, generator=generator)
    key = torch.randn(images, groups, tokens, 4, generator=generator)
    valid = torch.rand(images, 1, 1, tokens, generator=generator) < 0.6
    valid[..., 0] = True
    low = torch.zeros(valid.shape).masked_fill(~valid, torch.finfo(torch.float32).min)
    square = (images, 1, tokens, tokens)
    given_mask = {
        "none": None,
        "bool": valid.expand(square),
        "additive": low.expand(square),
        "flash": valid[:, 0, 0].long(),
    }[form]
    probe = ReceivedProbe(nn.Identity())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "_SCORES_AT_A_TIME", at_a_time)
        probe.read(query, key, given_mask, 0.3)
    expected_IN = eager_map(query, key, None if form == "none" else low).mean(dim=(1, 2))
    for image in range(images):
        read = probe.signals(image)
        torch.testing.assert_close(read[ATTENTION], expected_IN[image], atol=1e-6, rtol=0)
        assert read[RECEIVED_ATTENTION].equal(read[ATTENTION])
        torch.testing.assert_close(read[KEYS], key[image].mean(dim=0))


@torch.no_grad()
def test_received_attention_honours_the_mask_of_a_real_tower() -> None:
    set_seed(0)
    config = Idefics3VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, 2:] = False
    pixels = torch.randn(2, 3, 16, 16)
    config._attn_implementation = "eager"
    tower = Idefics3VisionTransformer(config).eval()
    maps = tower(pixels, patch_attention_mask=mask, output_attentions=True).attentions
    for implementation in ("eager", "sdpa"):
        tower.config._attn_implementation = implementation
        probe = ReceivedProbe(tower.encoder.layers[-1].self_attn)
        with probing(tower, probe):
            tower(pixels, patch_attention_mask=mask)
        read = torch.stack(probe.received)
        torch.testing.assert_close(read, maps[-1].mean(dim=(1, 2)), atol=1e-6, rtol=0)
        assert not read[1, 8:].any()


class Packed(nn.Module):
    """A tower of one attention module that hands two images to flash attention as one sequence."""

    def __init__(self, borders: Tensor) -> None:
        super().__init__()
        self.config = Idefics3VisionConfig()
        self.config._attn_implementation = "flash_in_test"
        self.borders = borders

    def forward(self, query: Tensor, key: Tensor) -> None:
        function = AttentionInterface()[self.config._attn_implementation]
        function(
            self, query, key, key, attention_mask=None, scaling=0.3, cu_seq_lens_q=self.borders
        )


def test_images_packed_into_one_sequence_are_read_one_by_one() -> None:
    AttentionInterface.register("flash_in_test", lambda module, query, *rest, **more: (query, None))
    AttentionMaskInterface.register("flash_in_test", lambda *given, **more: None)
    query, key = torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 4)
    tower = Packed(torch.tensor([0, 3, 7]))
    probe = ReceivedProbe(tower)
    with probing(tower, probe):
        tower(query, key)
    for image, span in enumerate([slice(0, 3), slice(3, 7)]):
        single = eager_map(query[:, :, span], key[:, :, span], None).mean(dim=(1, 2))[0]
        torch.testing.assert_close(probe.signals(image)[ATTENTION], single, atol=1e-6, rtol=0)
