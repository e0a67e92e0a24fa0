"""Inputs that could make a pruned prompt silently wrong: each is refused or has no effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sppruner import Budget, PruneSpec
from sppruner.errors import InputError
from sppruner.signals import probing
from sppruner.spec import DENSE
from sppruner.stages import LastQueryProbe
from tests.sppruner.families import FAMILIES, pruner_of
from tests.sppruner.laws.test_equivalence import kept_mask

PRUNED = PruneSpec(method="topk", budget=Budget(ratio=0.4))
QWEN = [family for family in FAMILIES if family.startswith("qwen")]
families = pytest.mark.parametrize("family", FAMILIES)


def forward(model: Any, inputs: dict[str, Any], **changes: Any) -> Tensor:
    """Logits of one forward without a cache, as scoring does it."""
    given = inputs | changes
    if "inputs_embeds" in given:
        given.pop("input_ids")
    with torch.no_grad():
        logits: Tensor = model(**given, use_cache=False).logits
    return logits


@families
def test_a_packed_prompt_is_read_as_one_sequence_without_a_cache(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gaps in positions are borders between packed sequences to transformers, where it has neither
    a cache nor a mask; a row without padding is where a mask could be thought needless."""
    pruner = pruner_of(family)
    for images in ([1], [1, 2, 0]):
        inputs = FAMILIES[family].batch(images)
        keep_BS = kept_mask(pruner, inputs, PRUNED, monkeypatch)
        positions = pruner.adapter.positions(inputs)
        masked = forward(
            pruner.model,
            inputs,
            attention_mask=inputs["attention_mask"] * keep_BS,
            position_ids=positions[0] if len(positions) == 1 else positions,
        )
        prepared = pruner.prepare(inputs, PRUNED)
        packed = forward(pruner.model, prepared.inputs)
        for row, mask_L in enumerate(prepared.inputs["attention_mask"].bool()):
            torch.testing.assert_close(
                packed[row][mask_L], masked[row][keep_BS[row].bool()], atol=2e-4, rtol=1e-4
            )


@pytest.mark.parametrize("family", QWEN)
def test_an_unpadded_prompt_with_mrope_is_one_sequence_even_without_its_mask(family: str) -> None:
    """Its text positions have no gaps; those of time, height and width are no borders."""
    pruner = pruner_of(family)
    first, second = (pruner.prepare(FAMILIES[family].batch([1]), PRUNED).inputs for _ in range(2))
    assert first["attention_mask"].all()
    bare = forward(pruner.model, second, attention_mask=None)
    torch.testing.assert_close(bare, forward(pruner.model, first), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", [DENSE, PRUNED], ids=["dense", "pruned"])
@families
def test_placeholders_without_their_images_are_refused(family: str, spec: PruneSpec) -> None:
    """Some families would answer from the placeholder's embedding and count it as a visual
    token."""
    inputs = FAMILIES[family].batch([0, 1])
    del inputs["pixel_values"]
    with pytest.raises(InputError, match=r"(have|has) places"):
        pruner_of(family).generate(inputs, spec, max_new_tokens=2)


@pytest.mark.parametrize("spec", [DENSE, PRUNED], ids=["dense", "pruned"])
@pytest.mark.parametrize("family", QWEN)
def test_mrope_positions_are_not_made_without_the_grids(family: str, spec: PruneSpec) -> None:
    """Without them transformers falls back to positions in one dimension."""
    inputs = FAMILIES[family].batch([1])
    del inputs["image_grid_thw"]
    with pytest.raises(InputError, match="has places for 12 visual tokens, its images give 0"):
        pruner_of(family).generate(inputs, spec, max_new_tokens=2)


@families
def test_a_packed_batch_always_brings_its_positions_and_its_mask(family: str) -> None:
    """Also for dense rows and rows without an image: `generate` would silently compute wrong
    positions for a shortened M-RoPE prompt."""
    pruner = pruner_of(family)
    rows = 1 if family not in QWEN else 4
    for specs in ([DENSE, PRUNED, PRUNED], [PruneSpec(method="grid")] * 3):
        given = pruner.prepare(FAMILIES[family].batch([1, 2, 0]), specs).inputs
        shape = given["input_ids"].shape
        assert given["attention_mask"].shape == shape
        assert given["position_ids"].shape == (shape if rows == 1 else (rows, *shape))


@families
def test_a_batch_without_images_is_plain_generate(family: str) -> None:
    pruner, inputs = pruner_of(family), FAMILIES[family].batch([0, 0, 0])
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [2]}
    plain = pruner.model.generate(**inputs, **settings)
    pruned = pruner.generate(inputs, PRUNED, **settings)
    assert pruned.tokens_BT.equal(plain[:, inputs["input_ids"].shape[1] :])
    assert not any(report.visual_tokens for report in pruned.reports)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@families
def test_a_probed_decoder_still_hides_the_padding(family: str, attention: str) -> None:
    """An attention function without a mask function of its name gets no mask at all: only padded
    rows would show it."""
    pruner = pruner_of(family, attention)
    inputs = FAMILIES[family].batch([1, 2, 0])
    assert not inputs["attention_mask"][0].all()
    settings: dict[str, Any] = {
        "max_new_tokens": 2,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    plain = torch.stack(pruner.model.generate(**inputs, **settings).logits)
    decoder = pruner.adapter.language_model()
    with probing(decoder, LastQueryProbe(decoder.layers[0].self_attn)):
        probed = torch.stack(pruner.model.generate(**inputs, **settings).logits)
    assert probed.equal(plain)
