"""The row that stages rank by is the last row of the eager attention map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from sppruner.signals import probing
from sppruner.stages import LastQueryProbe
from tests.sppruner.families import FAMILIES, pruner_of


def eager_map(family: str, layer: int, inputs: dict[str, Any]) -> torch.Tensor:
    """[B, heads, L, L] of a decoder layer."""
    pruner, maps = pruner_of(family, "eager"), []
    attention = pruner.adapter.language_model().layers[layer].self_attn
    handle = attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    pruner.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    handle.remove()
    return maps[0]


@pytest.mark.parametrize("static", [False, True], ids=["growing cache", "static cache"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_row_equals_the_eager_map(family: str, attention: str, static: bool) -> None:
    inputs = FAMILIES[family].batch([1, 2, 0])
    pruner = pruner_of(family, attention)
    decoder = pruner.adapter.language_model()
    for layer in range(pruner.adapter.capabilities.decoder_layers):
        probe = LastQueryProbe(decoder.layers[layer].self_attn)
        length = inputs["input_ids"].shape[1]
        cache = StaticCache(config=pruner.model.config, max_cache_len=length + 9)
        extra = {"past_key_values": cache} if static else {}
        with probing(decoder, probe):
            pruner.model.generate(**inputs, max_new_tokens=1, do_sample=False, **extra)
        row_BL = probe.take(inputs["attention_mask"])
        expected_BL = eager_map(family, layer, inputs)[:, :, -1].mean(dim=1)
        torch.testing.assert_close(row_BL, expected_BL, atol=1e-6, rtol=0)
        torch.testing.assert_close(row_BL.sum(dim=1), torch.ones(3))


def test_keys_beyond_the_prompt_and_padding_count_for_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    query_BHLD = torch.randn(2, 4, 5, 8, generator=generator)
    key_BHLD = torch.randn(2, 2, 9, 8, generator=generator)
    mask_BL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    probe = LastQueryProbe(torch.nn.Identity())
    probe.read(query_BHLD, key_BHLD, None, 0.5)
    row_BL = probe.take(mask_BL)

    repeated_BHLD = key_BHLD[:, :, :5].repeat_interleave(2, dim=1)
    scores_BHL = (query_BHLD[:, :, -1:] @ repeated_BHLD.transpose(2, 3))[:, :, 0] * 0.5
    assert torch.equal(row_BL[0, :2], torch.zeros(2))
    torch.testing.assert_close(row_BL[0, 2:], scores_BHL[0, :, 2:].softmax(dim=-1).mean(dim=0))
    torch.testing.assert_close(row_BL[1], scores_BHL[1].softmax(dim=-1).mean(dim=0))
