"""InternVL: images found by their runs, features fed through the embeddings, variants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import InternVLConfig

from sppruner import Budget, Pruner, PruneSpec
from sppruner.adapters import InternVLAdapter, capabilities
from sppruner.compact import full_positions
from sppruner.errors import InputError, UnsupportedModel
from tests.sppruner.families.base import left_padded
from tests.sppruner.families.internvl import END, IMAGE, START, TOKENS, batch, build


def test_the_prompt_carries_embeddings_beside_ids_and_no_encoder_output() -> None:
    model, inputs = build(), batch([1, 2])
    prepared = Pruner(model).prepare(inputs, PruneSpec(method="grid", budget=Budget(ratio=0.3)))
    embeds_BLD, ids_BL = prepared.inputs["inputs_embeds"], prepared.inputs["input_ids"]
    assert "mm_encoder_outputs" not in prepared.inputs
    text_BL = ids_BL != IMAGE
    plain_BLD = model.get_input_embeddings()(ids_BL)
    assert embeds_BLD[text_BL].equal(plain_BLD[text_BL])
    encoded = InternVLAdapter(model).encode(inputs, frozenset())
    features_KD = torch.cat([image.run_ND for image in encoded.images])
    kept_KD = embeds_BLD[~text_BL]
    assert kept_KD.shape[0] == sum(report.visual_tokens_kept for report in prepared.reports)
    assert all((features_KD == kept_D).all(dim=1).any() for kept_D in kept_KD)


@pytest.mark.parametrize("kept", [[16, 3], [0, 5], [1, 0]])
def test_beams_of_ragged_prompts_do_not_mix(kept: list[int]) -> None:
    model, inputs = build(), batch([1, 1])
    specs = [PruneSpec(method="grid", budget=Budget(tokens=k)) for k in kept]
    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "suppress_tokens": [2, IMAGE]}
    together = Pruner(model).generate(inputs, specs, **settings).tokens_BT
    tiles = [shape.tiles for _, shape in InternVLAdapter(model).shapes(inputs)]
    pixels = torch.split(inputs["pixel_values"], tiles)
    for row, spec in enumerate(specs):
        single = {k: inputs[k][row : row + 1] for k in ("input_ids", "attention_mask")}
        single["pixel_values"] = pixels[row]
        assert Pruner(model).generate(single, spec, **settings).tokens_BT[0].equal(together[row])


def test_video_frames_are_images_of_one_tile() -> None:
    frame = [START, *[IMAGE] * TOKENS, END]
    inputs = left_padded([[1, 20, *frame, 21, *frame, 22], [1, 23, 24]])
    inputs["pixel_values"] = torch.randn(2, 3, 32, 32)
    shapes = InternVLAdapter(build()).shapes(inputs)
    assert [(row, shape.tiles) for row, shape in shapes] == [(0, 1), (0, 1)]


def test_a_run_that_is_no_whole_number_of_tiles_is_refused() -> None:
    inputs = left_padded([[1, START, *[IMAGE] * (TOKENS + 1), END]])
    with pytest.raises(InputError, match="17 places for visual tokens in a row, a tile has 16"):
        InternVLAdapter(build()).shapes(inputs | {"pixel_values": torch.randn(1, 3, 32, 32)})


def test_tiles_without_places_are_refused_before_the_encoder_runs() -> None:
    inputs = batch([1])
    more = inputs | {"pixel_values": torch.randn(4, 3, 32, 32)}
    with pytest.raises(InputError, match="4 tiles were given, the prompts have places for 3"):
        InternVLAdapter(build()).encode(more, frozenset())


@pytest.mark.parametrize("layer", [-1, -2, 2])
def test_other_feature_layers_are_read_as_the_model_reads_them(layer: int) -> None:
    model, inputs = build(vision_feature_layer=layer), batch([1, 1])
    settings: dict[str, Any] = {"max_new_tokens": 4, "suppress_tokens": [2, IMAGE]}
    spec = PruneSpec(method="topk", budget=Budget(ratio=1.0))
    pruner = Pruner(model)
    plain = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    assert pruner.generate(inputs, spec, **settings).tokens_BT.equal(plain)
    with torch.no_grad():
        image = pruner.adapter.encode(inputs, frozenset()).images[0]
        plane = image.planes[0]
        assert plane.hidden_NV is not None
        projected = pruner.adapter.project(plane.hidden_NV)
    torch.testing.assert_close(projected, plane.features_ND, atol=1e-4, rtol=1e-4)
    assert pruner.adapter.positions(inputs).equal(full_positions(inputs["attention_mask"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-2, -3]}, "concatenates vision layers"),
        ({"vision_feature_layer": 0}, "vision_feature_layer=0 reads the tower's embeddings"),
        ({"vision_feature_select_strategy": "full"}, "load the model with 'default'"),
        ({"vision_config": {"image_size": [448, 224]}}, "448×224"),
    ],
)
def test_variants_that_cannot_be_served_say_what_to_load(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        capabilities(InternVLConfig(**change))
