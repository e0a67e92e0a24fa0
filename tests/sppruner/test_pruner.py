"""Pruned equals masked; keep-all equals `generate`; nothing unpruned passes as pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sppruner import Budget, Pruner, PruneSpec
from sppruner.adapters import Encoded, Kept, LlavaAdapter
from sppruner.compact import full_positions
from sppruner.errors import InputError, MissingSignal, PruningHadNoEffect, SpecError, UnknownMethod
from sppruner.selectors import selector_for
from sppruner.spec import DENSE, OptionValue
from tests.sppruner.families.llava import IMAGE, TOKENS, batch, build

NEW = 8
# EOS is suppressed: a finished row is padded and would compare equal for the wrong reason.
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "suppress_tokens": [2, IMAGE],
    "return_dict_in_generate": True,
    "output_logits": True,
}
METHODS = ["sppruner", "random", "grid", "topk"]
ROWS = [[1, 1, 1], [1, 2, 0]]


def spec(method: str, ratio: float, **kwargs: Any) -> PruneSpec:
    options: dict[str, OptionValue] = {}
    if method == "sppruner":
        options = {"relevance": "none", "kappa": 0.0}
    return PruneSpec(method=method, budget=Budget(ratio=ratio), options=options, **kwargs)


def logits(output: Any) -> Tensor:
    return torch.stack(output.logits, dim=1)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.mark.parametrize("images", ROWS)
@pytest.mark.parametrize("method", METHODS)
def test_keeping_every_token_is_bit_equal_to_plain_generate(
    model: Any, method: str, images: list[int]
) -> None:
    inputs = batch(images)
    plain = model.generate(**inputs, **GREEDY)
    kept = Pruner(model).generate(inputs, spec(method, 1.0), **GREEDY)
    assert torch.equal(kept.tokens_BT, plain.sequences[:, -NEW:])
    assert torch.equal(logits(kept.output), logits(plain))


def masked_reference(model: Any, inputs: dict[str, Tensor], keep_BS: Tensor) -> Any:
    """The full sequence with dropped tokens hidden by the mask, all at their original positions."""
    mask_BS = inputs["attention_mask"] * keep_BS
    return model.generate(
        **(inputs | {"attention_mask": mask_BS}),
        position_ids=full_positions(inputs["attention_mask"])[0],
        **GREEDY,
    )


@pytest.mark.parametrize("images", ROWS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.5, 0.22, 0.06])
def test_pruned_equals_the_full_sequence_with_dropped_tokens_masked(
    model: Any, method: str, ratio: float, images: list[int]
) -> None:
    inputs = batch(images)
    pruner = Pruner(model)
    prepared = pruner.prepare(inputs, spec(method, ratio))
    keep_BS = torch.ones_like(inputs["attention_mask"])
    chosen = []
    for image, selection in prepared.selections:
        mask_N = torch.zeros(image.count, dtype=torch.long)
        mask_N[selection.index_K] = 1
        chosen.append(mask_N)
    keep_BS[inputs["input_ids"] == IMAGE] = torch.cat(chosen)
    reference = masked_reference(model, inputs, keep_BS)
    pruned = pruner.generate(inputs, spec(method, ratio), **GREEDY)
    assert torch.equal(pruned.tokens_BT, reference.sequences[:, -NEW:])
    torch.testing.assert_close(logits(pruned.output), logits(reference), atol=1e-3, rtol=1e-3)


def test_mixed_specs_in_one_batch_give_each_row_its_single_row_result() -> None:
    model = build()
    inputs = batch([1, 1, 2, 0])
    specs = [spec("topk", 0.5), DENSE, spec("sppruner", 0.22), spec("grid", 0.3)]
    together = Pruner(model).generate(inputs, specs, **GREEDY)
    first_image = [0, 1, 2, 4, 4]
    for row, one in enumerate(specs):
        single = {k: v[row : row + 1] for k, v in inputs.items() if k != "pixel_values"}
        pixels = inputs["pixel_values"][first_image[row] : first_image[row + 1]]
        if len(pixels):
            single["pixel_values"] = pixels
        result = Pruner(model).generate(single, one, **GREEDY)
        assert torch.equal(result.tokens_BT[0], together.tokens_BT[row])
        assert result.reports[0].visual_tokens_kept == together.reports[row].visual_tokens_kept
        assert result.reports[0].prompt_tokens == together.reports[row].prompt_tokens


@pytest.mark.parametrize(
    "extra", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_beams_and_sampling_equal_the_masked_reference(extra: dict[str, Any]) -> None:
    model = build()
    inputs = batch([1, 1])
    pruner = Pruner(model)
    settings = GREEDY | extra
    prepared = pruner.prepare(inputs, spec("topk", 0.4))
    keep_BS = torch.ones_like(inputs["attention_mask"])
    keep_BS[inputs["input_ids"] == IMAGE] = 0
    places = (inputs["input_ids"] == IMAGE).nonzero()
    for image, selection in prepared.selections:
        own = places[places[:, 0] == image.row]
        keep_BS[own[selection.index_K, 0], own[selection.index_K, 1]] = 1
    torch.manual_seed(7)
    reference = model.generate(
        **(inputs | {"attention_mask": inputs["attention_mask"] * keep_BS}),
        position_ids=full_positions(inputs["attention_mask"])[0],
        **settings,
    )
    torch.manual_seed(7)
    pruned = pruner.generate(inputs, spec("topk", 0.4), **settings)
    assert torch.equal(pruned.tokens_BT, reference.sequences[:, inputs["input_ids"].shape[1] :])


def test_renumbered_positions_are_contiguous_and_kept_ones_are_a_subset() -> None:
    model = build()
    inputs = batch([1, 2])
    full = full_positions(inputs["attention_mask"])[0]
    for policy in ("keep", "renumber"):
        prepared = Pruner(model).prepare(inputs, spec("grid", 0.25, positions=policy))
        mask, positions = prepared.inputs["attention_mask"], prepared.inputs["position_ids"]
        assert ((mask[:, 1:] - mask[:, :-1]) >= 0).all(), "padding must be on the left only"
        for row in range(2):
            used = positions[row][mask[row].bool()].tolist()
            if policy == "renumber":
                assert used == list(range(len(used)))
            else:
                assert set(used) <= set(full[row].tolist())
                assert used == sorted(set(used))


def test_reports_count_the_models_input_tensors() -> None:
    model = build()
    inputs = batch([1, 2, 0])
    prepared = Pruner(model).prepare(inputs, spec("grid", 0.25))
    kept = (prepared.inputs["input_ids"] == IMAGE).sum(dim=1).tolist()
    assert [r.visual_tokens for r in prepared.reports] == [TOKENS, 2 * TOKENS, 0]
    assert [r.visual_tokens_kept for r in prepared.reports] == kept == [4, 8, 0]
    lengths = prepared.inputs["attention_mask"].sum(dim=1).tolist()
    assert [r.prompt_tokens for r in prepared.reports] == lengths


class IgnoresTheSelection(LlavaAdapter):
    """Passes every feature on, whatever was selected."""

    def pack(self, encoded: Encoded, kept: Sequence[Kept]) -> Any:
        return super().pack(
            encoded,
            [
                Kept(index_K=torch.arange(image.count), features_KD=image.run_ND)
                for image in encoded.images
            ],
        )


def test_an_adapter_that_ignores_the_selection_cannot_pass_as_pruned() -> None:
    model = build()
    pruner = Pruner(model, adapter=IgnoresTheSelection(model))
    with pytest.raises(PruningHadNoEffect, match="4 of 16"):
        pruner.generate(batch([1, 1]), spec("grid", 0.25), **GREEDY)


def test_inputs_are_not_modified_and_attention_is_restored_after_an_error() -> None:
    model = build()
    inputs = batch([1, 1])
    before = {name: value.clone() for name, value in inputs.items()}
    pruner = Pruner(model)
    first = pruner.generate(inputs, spec("topk", 0.3), **GREEDY)
    second = pruner.generate(inputs, spec("topk", 0.3), **GREEDY)
    assert torch.equal(first.tokens_BT, second.tokens_BT)
    for name, value in inputs.items():
        assert torch.equal(value, before[name])
    with pytest.raises(InputError):
        pruner.generate(inputs | {"pixel_values": inputs["pixel_values"][:1]}, spec("topk", 0.3))
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_bad_specs_fail_with_the_reason_before_anything_runs() -> None:
    pruner = Pruner(build())
    with pytest.raises(UnknownMethod, match="sppruner"):
        pruner.check(PruneSpec(method="spruner", budget=Budget(ratio=0.5)))
    with pytest.raises(SpecError, match="no option 'lambda'"):
        pruner.check(PruneSpec(method="sppruner", options={"lambda": 0.5}))
    with pytest.raises(SpecError, match="is not a float"):
        pruner.check(PruneSpec(method="sppruner", options={"mu": "high"}))
    with pytest.raises(MissingSignal, match="tokenizer"):
        pruner.check(PruneSpec(method="sppruner", budget=Budget(ratio=0.5)))
    with pytest.raises(MissingSignal, match="CLIP text tower"):
        pruner.check(PruneSpec(method="sppruner", options={"relevance": "clip"}))


def test_an_image_may_lose_all_its_tokens() -> None:
    model = build()
    nothing = PruneSpec(method="grid", budget=Budget(tokens=0))
    generated = Pruner(model).generate(batch([1, 1]), nothing, **GREEDY)
    assert [r.visual_tokens_kept for r in generated.reports] == [0, 0]
    assert generated.tokens_BT.shape == (2, NEW)


def test_flops_of_selecting_are_counted_image_by_image() -> None:
    """It is 0 for a dense row, an image kept whole, or a method that reads no features."""
    model = build()
    pruner = Pruner(model)
    inputs = batch([2, 1, 1, 1])
    specs = [spec("sppruner", 0.5), spec("sppruner", 1.0), DENSE, spec("grid", 0.5)]
    flops = [report.selection_flops for report in pruner.prepare(inputs, specs).reports]
    width = model.config.text_config.hidden_size
    selector = selector_for(spec("sppruner", 0.5))
    assert selector is not None
    assert flops == [2 * selector.flops(TOKENS, TOKENS // 2, width), 0, 0, 0]
