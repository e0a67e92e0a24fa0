"""Other routes to the same answer: chunks, prompt look-up, embeddings, eager attention,
bfloat16."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from sppruner import Budget, Pruner, PruneSpec
from sppruner.errors import InputError
from sppruner.pruner import Prepared
from sppruner.spec import DENSE
from tests.sppruner.families import FAMILIES, pruner_of
from tests.sppruner.laws import test_equivalence as equivalence
from tests.sppruner.laws.test_equivalence import kept_mask, logits, reference, settings

MIXED = [1, 2, 0]
TOPK = PruneSpec(method="topk", budget=Budget(ratio=0.4))
# Packs embeddings, because ragged images do not fit its one tensor of tiles.
EMBEDS = ["internvl"]
# States of the tower that are added after decoder layers travel with the encoder output only.
DEEPSTACK = ["qwen3_vl"]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in EMBEDS])
def test_a_prompt_read_in_chunks_equals_one_read_whole(family: str) -> None:
    """Chunks of 7 cut images in two. The whole one equals the masked one, see the matrix."""
    pruner, inputs = pruner_of(family), FAMILIES[family].batch(MIXED)
    whole = pruner.generate(inputs, TOPK, **settings(FAMILIES[family]))
    cut = pruner.generate(inputs, TOPK, **settings(FAMILIES[family], prefill_chunk_size=7))
    assert cut.tokens_BT.equal(whole.tokens_BT)
    torch.testing.assert_close(logits(cut.output), logits(whole.output), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", EMBEDS)
def test_chunks_of_a_prompt_of_embeddings_are_refused(family: str) -> None:
    """In chunks of one token transformers would silently answer wrongly."""
    pruner, inputs = pruner_of(family), FAMILIES[family].batch([1])
    for size in (1, 7):
        with pytest.raises(InputError, match=f"prefill_chunk_size={size}.* leave it out"):
            pruner.generate(inputs, TOPK, max_new_tokens=2, prefill_chunk_size=size)
        config = GenerationConfig(max_new_tokens=2, prefill_chunk_size=size)
        with pytest.raises(InputError, match="leave it out"):
            pruner.generate(inputs, TOPK, generation_config=config)
    whole = pruner.generate(inputs, TOPK, **settings(FAMILIES[family]))
    one_chunk = settings(FAMILIES[family], prefill_chunk_size=999)
    assert pruner.generate(inputs, TOPK, **one_chunk).tokens_BT.equal(whole.tokens_BT)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_looked_up_in_the_prompt_are_accepted_only_where_greedy_agrees(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt look-up feeds several tokens a step after a pruned prompt."""
    pruner, inputs = pruner_of(family), FAMILIES[family].batch([2])
    more = settings(FAMILIES[family], max_new_tokens=12)
    keep_BS = kept_mask(pruner, inputs, TOPK, monkeypatch)
    masked = reference(pruner, inputs, keep_BS, more)
    found = pruner.generate(inputs, TOPK, **more, prompt_lookup_num_tokens=2)
    assert found.tokens_BT.equal(masked.sequences[:, inputs["input_ids"].shape[1] :])


def other_route(pruner: Pruner, prepared: Prepared) -> dict[str, Any]:
    """The same batch as embeddings where it came with an encoder output, and the reverse."""
    given = dict(prepared.inputs)
    features_KD = torch.cat([kept.features_KD for kept in prepared.kept])
    if "inputs_embeds" in given:
        del given["inputs_embeds"]
        output = pruner.adapter.encode(FAMILIES["internvl"].batch(MIXED), frozenset()).output
        given["mm_encoder_outputs"] = {"image": type(output)(pooler_output=features_KD[None])}
    else:
        del given["mm_encoder_outputs"]
        embeds_BLD = pruner.adapter.input_embedding(given["input_ids"])
        visual_BL1 = pruner.adapter.placeholders(given["input_ids"])[..., None]
        given["inputs_embeds"] = embeds_BLD.masked_scatter(visual_BL1, features_KD)
    return given


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in DEEPSTACK])
@torch.no_grad()
def test_features_reach_the_decoder_alike_as_embeddings_and_as_encoder_output(family: str) -> None:
    pruner = pruner_of(family)
    prepared = pruner.prepare(FAMILIES[family].batch(MIXED), TOPK)
    given = other_route(pruner, prepared)
    default = pruner.run(prepared, **settings(FAMILIES[family]))
    other = pruner.model.generate(**given, **settings(FAMILIES[family]))
    assert default.tokens_BT.equal(other.sequences[:, given["input_ids"].shape[1] :])
    torch.testing.assert_close(logits(default.output), logits(other), atol=1e-5, rtol=0)


@functools.cache
def eager_model_of(family: str) -> Any:
    return FAMILIES[family].build("eager")


@pytest.mark.parametrize("family", FAMILIES)
def test_under_eager_attention_pruned_equals_masked_and_keep_all_plain_generate(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equivalence, "model_of", eager_model_of)
    equivalence.keep_all(FAMILIES[family], monkeypatch)
    equivalence.assert_pruned_equals_masked(FAMILIES[family], MIXED, TOPK, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_all_kept_is_plain_generate_and_padded_rows_stay_finite(family: str) -> None:
    """The usual dtype on GPUs: no step may require float32. The batch has a merging method and one
    inside the decoder."""
    half = Pruner(FAMILIES[family].build().bfloat16())
    inputs = FAMILIES[family].batch([1, 2, 0, 1])
    options = settings(FAMILIES[family], max_new_tokens=3)
    plain = half.model.generate(**inputs, **options)
    kept = half.generate(inputs, PruneSpec(method="grid"), **options)
    assert logits(kept.output).equal(logits(plain))
    layer = half.adapter.capabilities.first_prunable_layer
    assert layer is not None
    merging = PruneSpec(method="visionzip", budget=Budget(ratio=0.4))
    staged = PruneSpec(method="fastv", budget=Budget(ratio=0.4), options={"layer": layer})
    mixed = half.generate(inputs, [TOPK, merging, DENSE, staged], **options)
    found = logits(mixed.output)
    found[..., options["suppress_tokens"]] = 0
    assert found.isfinite().all()
    cache = mixed.output.past_key_values
    assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
    exact = pruner_of(family).prepare(inputs, [TOPK, merging, DENSE, staged]).reports
    assert [r.layer_tokens for r in mixed.reports] == [r.layer_tokens for r in exact]
