"""Towers do less work, and their features stay bit-equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sppruner.adapters import EncodedImage, adapter_for, anyres, internvl, llava, qwen_vl
from sppruner.adapters.towers import _attend_within_spans, skipping_layers_after
from sppruner.signals import ReceivedProbe, probing
from tests.sppruner.families import FAMILIES, qwen2_vl

MIXED = [1, 2, 0, 1]
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
qwens = pytest.mark.parametrize("family", QWEN)
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
# Families that read one layer, and the option that selects it; their towers have three layers.
LAYER = {
    "llava": "feature_layer",
    "llava_next": "feature_layer",
    "llava_onevision": "feature_layer",
    "internvl": "vision_feature_layer",
}
# The layer that is read, and how many layers run for it.
RUNNING = [(-1, 3), (-2, 2), (-3, 1), (1, 1), (2, 2), (3, 3)]
layers_read = pytest.mark.parametrize(("read", "running"), RUNNING)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextmanager
def whole_towers() -> Iterator[None]:
    """Adapters that do not change towers."""

    def unchanged(*_: Any) -> Any:
        return nullcontext()

    with pytest.MonkeyPatch.context() as patch:
        for module in (llava, anyres, internvl):
            patch.setattr(module, "skipping_layers_after", unchanged)
        patch.setattr(qwen_vl, "batched_span_attention", unchanged)
        yield


def layers_of(model: Any) -> Sequence[Any]:
    """Of a tower that encodes tiles."""
    encoder = model.model.vision_tower.encoder
    return encoder.layer if hasattr(encoder, "layer") else encoder.layers


def assert_same(image: EncodedImage, other: EncodedImage) -> None:
    assert image.run_ND.equal(other.run_ND)
    for mine, theirs in zip(image.deepstack, other.deepstack, strict=True):
        assert mine.equal(theirs)
    for plane, twin in zip(image.planes, other.planes, strict=True):
        assert plane.features_ND.equal(twin.features_ND)
        if plane.hidden_NV is None:
            assert twin.hidden_NV is None
        else:
            assert twin.hidden_NV is not None
            assert plane.hidden_NV.equal(twin.hidden_NV)
        assert plane.signals.keys() == twin.signals.keys()
        for name, value in plane.signals.items():
            assert value.equal(twin.signals[name]), name


def assert_encodes_alike(model: Any, inputs: dict[str, Tensor]) -> None:
    adapter = adapter_for(model)
    for signals in (frozenset[str](), adapter.capabilities.signals):
        fast = adapter.encode(inputs, signals)
        with whole_towers():
            slow = adapter.encode(inputs, signals)
        assert fast.images
        for image, other in zip(fast.images, slow.images, strict=True):
            assert_same(image, other)


@attentions
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_encodes_different_sizes_equally(family: str, attention: str) -> None:
    assert_encodes_alike(FAMILIES[family].build(attention), FAMILIES[family].batch(MIXED))


@layers_read
@pytest.mark.parametrize("family", LAYER)
def test_images_are_encoded_equally_for_every_feature_layer(
    family: str, read: int, running: int
) -> None:
    options: dict[str, Any] = {LAYER[family]: read}
    model = FAMILIES[family].build(**options)
    assert_encodes_alike(model, FAMILIES[family].batch(MIXED))


@qwens
def test_equal_sizes_are_encoded_equally(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen2_vl, "GRIDS", [(6, 8), (6, 8), (8, 8)])
    assert_encodes_alike(FAMILIES[family].build(), FAMILIES[family].batch([3, 3]))


@layers_read
@pytest.mark.parametrize("family", LAYER)
def test_layers_after_the_one_that_is_read_do_not_run(family: str, read: int, running: int) -> None:
    options: dict[str, Any] = {LAYER[family]: read}
    model = FAMILIES[family].build(**options)
    ran = []
    for layer in layers_of(model):
        layer.mlp.register_forward_hook(lambda mlp, *_: ran.append(mlp))
    adapter_for(model).encode(FAMILIES[family].batch([1]), frozenset())
    assert ran == [layer.mlp for layer in list(layers_of(model))[:running]]


@pytest.mark.parametrize("family", LAYER)
def test_a_tower_that_was_first_used_by_an_encoding_records_all_its_states_later(
    family: str,
) -> None:
    """transformers installs its recorders of states on a tower's first forward."""
    options: dict[str, Any] = {LAYER[family]: -3}
    model, fresh = (FAMILIES[family].build(**options) for _ in range(2))
    inputs = FAMILIES[family].batch([1])
    adapter_for(model).encode(inputs, frozenset())
    pixels = inputs["pixel_values"]
    pixels = pixels.flatten(0, 1) if pixels.dim() == 5 else pixels
    states, expected = (
        one.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        for one in (model, fresh)
    )
    assert len(states) == len(layers_of(model)) + 1
    for state, other in zip(states, expected, strict=True):
        assert state.equal(other)


def test_an_error_restores_the_forward_of_skipped_layers() -> None:
    """Also a forward of the instance, which offloading sets over that of the class."""
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    states = torch.randn(1, 2)
    layers[2].forward = offloaded = lambda given: given + 1

    with pytest.raises(RuntimeError, match="on purpose"), skipping_layers_after(layers, 1):  # noqa: PT012
        assert not layers[0](states).equal(states)
        assert layers[1](states).equal(layers[2](states))
        assert layers[1](states).equal(states)
        raise RuntimeError("on purpose")
    assert "forward" not in vars(layers[1])
    assert layers[2].forward is offloaded
    assert layers[2](states).equal(states + 1)


@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 8, 40]), min_size=1, max_size=12),
    heads=st.integers(1, 3),
)
@settings(deadline=None)
def test_batched_spans_equal_separate_calls(lengths: list[int], heads: int) -> None:
    torch.manual_seed(len(lengths))
    # As in towers: one projection of all patches, viewed with heads before patches.
    states = torch.randn(sum(lengths), 3, heads, 8)
    query, key, value = (one.transpose(0, 1)[None] for one in states.unbind(1))
    borders = torch.tensor([0, *lengths]).cumsum(0)
    module = nn.Identity()
    given_all = {"scaling": 0.3, "dropout": 0.0, "is_causal": False}
    together, _ = _attend_within_spans(
        module, query, key, value, None, cu_seq_lens_q=borders, **given_all
    )
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    single = [
        sdpa(module, *(one[:, :, start:stop] for one in (query, key, value)), None, **given_all)[0]
        for start, stop in pairwise(borders.tolist())
    ]
    assert together.equal(torch.cat(single, dim=1))


@qwens
def test_consecutive_spans_of_one_length_share_a_call(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images of four windows each: one call in every block."""
    monkeypatch.setattr(qwen2_vl, "GRIDS", [(8, 8)])
    made: list[Tensor] = []
    plain = nn.functional.scaled_dot_product_attention

    def counting(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.append(query)
        return plain(query, *args, **kwargs)

    adapter = adapter_for(FAMILIES[family].build())
    blocks = len(adapter.model.model.visual.blocks)
    inputs = FAMILIES[family].batch([2])
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counting)
    adapter.encode(inputs, adapter.capabilities.signals)
    assert len(made) == blocks
    made.clear()
    with whole_towers():
        adapter.encode(inputs, frozenset())
    assert len(made) >= 2 * blocks


@attentions
@pytest.mark.parametrize("family", [*LAYER, *QWEN])
def test_an_error_within_an_encoding_does_not_change_the_tower(family: str, attention: str) -> None:
    options = {LAYER[family]: -2} if family in LAYER else {}
    model, inputs = FAMILIES[family].build(attention, **options), FAMILIES[family].batch([1])
    tower = model.model.visual if family in QWEN else model.model.vision_tower
    layers = tower.blocks if family in QWEN else layers_of(model)
    adapter = adapter_for(model)
    before = adapter.encode(inputs, adapter.capabilities.signals)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    hook = layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        adapter.encode(inputs, adapter.capabilities.signals)
    hook.remove()
    assert tower.config._attn_implementation == attention
    assert all("forward" not in vars(layer) for layer in layers)
    after = adapter.encode(inputs, adapter.capabilities.signals)
    for image, other in zip(after.images, before.images, strict=True):
        assert_same(image, other)


@qwens
def test_a_probe_around_an_encoding_still_reads(family: str) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].batch(MIXED)
    tower, adapter = model.model.visual, adapter_for(model)
    signals = adapter.capabilities.signals
    outer = ReceivedProbe(tower.blocks[0].attn)
    with probing(tower, outer):
        inside = adapter.encode(inputs, signals)
    assert outer.received
    for image, other in zip(inside.images, adapter.encode(inputs, signals).images, strict=True):
        assert_same(image, other)
    assert tower.config._attn_implementation == "sdpa"
