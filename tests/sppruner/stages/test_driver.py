"""The driver around one `generate`: it leaves no trace, and refuses settings that it does not
support."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList, MistralConfig

from sppruner import Budget, Pruner, PruneSpec, signals
from sppruner.adapters import capabilities
from sppruner.errors import InputError, MissingSignal, PruningHadNoEffect, UnsupportedModel
from sppruner.stages import StageDriver
from tests.sppruner.families.llava import IMAGE, batch, build

SPEC = PruneSpec(method="fastv", budget=Budget(ratio=0.3), options={"layer": 1})
NEW = 4
SETTINGS: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "suppress_tokens": [2, IMAGE],
}


@pytest.fixture(scope="module")
def pruner() -> Pruner:
    return Pruner(build())


def assert_untouched(pruner: Pruner) -> None:
    decoder = pruner.adapter.language_model()
    assert not any(layer._forward_pre_hooks for layer in decoder.layers)
    assert decoder.config._attn_implementation == "sdpa"
    assert not signals._active


class Fails(LogitsProcessor):
    """Raises at a step, of which the first is the prompt's."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError
        return scores


@pytest.mark.parametrize("step", [1, 2])
def test_an_exception_does_not_change_the_model(pruner: Pruner, step: int) -> None:
    before = pruner.generate(batch([1, 2]), SPEC, **SETTINGS)
    failing = LogitsProcessorList([Fails(step)])
    with pytest.raises(ZeroDivisionError):
        pruner.generate(batch([1, 2]), SPEC, logits_processor=failing, **SETTINGS)
    assert_untouched(pruner)
    after = pruner.generate(batch([1, 2]), SPEC, **SETTINGS)
    assert torch.equal(before.tokens_BT, after.tokens_BT)


def test_an_exception_inside_the_prompt_s_forward_does_not_change_the_model(
    pruner: Pruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = pruner.adapter.language_model().layers[-1].mlp
    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", lambda hidden: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            pruner.generate(batch([1, 2]), SPEC, **SETTINGS)
    assert_untouched(pruner)


def test_pruned_calls_do_not_change_a_later_dense_one(pruner: Pruner) -> None:
    plain = pruner.model.generate(**batch([1, 0, 2]), **SETTINGS)
    for _ in range(2):
        pruner.generate(batch([1, 0, 2]), SPEC, **SETTINGS)
    assert_untouched(pruner)
    assert torch.equal(pruner.model.generate(**batch([1, 0, 2]), **SETTINGS), plain)


def test_attention_is_probed_in_the_prompt_s_forward_only(pruner: Pruner) -> None:
    config = pruner.adapter.language_model().config
    seen: list[str] = []

    def note(module: Any, args: Any) -> None:
        seen.append(config._attn_implementation)

    handle = pruner.adapter.language_model().register_forward_pre_hook(note)
    pruner.generate(batch([1]), SPEC, **SETTINGS)
    handle.remove()
    assert seen == ["sppruner_probe_sdpa", *["sdpa"] * (NEW - 1)]


@pytest.mark.parametrize(
    "setting",
    [
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_do_not_read_the_prompt_in_one_forward_are_refused(
    pruner: Pruner, setting: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="leave out prefill_chunk_size"):
        pruner.generate(batch([1]), SPEC, **SETTINGS, **setting)
    assert_untouched(pruner)


def test_one_driver_serves_one_generate(pruner: Pruner) -> None:
    first, second = (pruner.prepare(batch([1]), SPEC) for _ in range(2))
    assert first.stages is not None
    with StageDriver(pruner.adapter, first.stages):
        pruner.model.generate(**first.inputs, **SETTINGS)
        with pytest.raises(InputError, match="one token per forward"):
            pruner.model.generate(**second.inputs, **SETTINGS)


def test_a_stage_that_is_never_reached_is_an_error(pruner: Pruner) -> None:
    prepared = pruner.prepare(batch([1]), SPEC)
    assert prepared.stages is not None
    with (
        pytest.raises(PruningHadNoEffect, match=r"\[1\] were planned, \[\] were"),
        StageDriver(pruner.adapter, prepared.stages),
    ):
        pass


def test_a_prompt_that_ends_in_its_image_is_refused(pruner: Pruner) -> None:
    inputs = batch([1])
    end = int((inputs["input_ids"][0] == IMAGE).nonzero().max()) + 1
    inputs["input_ids"] = inputs["input_ids"][:, :end]
    inputs["attention_mask"] = inputs["attention_mask"][:, :end]
    with pytest.raises(InputError, match="prompt 0 ends in an image"):
        pruner.prepare(inputs, SPEC)


def test_a_decoder_with_a_sliding_window_has_no_stages() -> None:
    config = build().config
    windowed = MistralConfig(sliding_window=32, num_hidden_layers=3)
    config.text_config = windowed
    assert capabilities(config).first_prunable_layer is None
    windowed.sliding_window = None
    assert capabilities(config).first_prunable_layer == 1


def test_a_window_set_after_the_capabilities_were_read_is_refused() -> None:
    pruner = Pruner(build())
    pruner.adapter.language_model().config.sliding_window = 8
    with pytest.raises(UnsupportedModel, match="in front of layer 1; use a method"):
        pruner.generate(batch([1]), SPEC, **SETTINGS)


def test_a_layer_whose_scores_cannot_be_computed_is_refused() -> None:
    pruner = Pruner(build())
    attention = pruner.adapter.language_model().layers[1].self_attn
    spec = PruneSpec(method="pyramiddrop", budget=Budget(ratio=0.3), options={"layers": "1"})
    pruner.generate(batch([1]), spec, **SETTINGS)
    attention.k_norm = torch.nn.LayerNorm(2 * attention.head_dim)  # of all heads, as OLMo 2 has it
    with pytest.raises(UnsupportedModel, match="scoring='before'"):
        pruner.generate(batch([1]), spec, **SETTINGS)
    del attention.k_norm, attention.k_proj
    with pytest.raises(UnsupportedModel, match="scoring='before'"):
        pruner.generate(batch([1]), spec, **SETTINGS)
    assert_untouched(pruner)


def test_scores_of_a_stage_s_own_layer_need_no_probe(pruner: Pruner) -> None:
    config = pruner.adapter.language_model().config
    spec = PruneSpec(method="pyramiddrop", budget=Budget(ratio=0.3))
    seen: list[str] = []
    handle = pruner.adapter.language_model().register_forward_pre_hook(
        lambda module, args: seen.append(config._attn_implementation)
    )
    pruner.generate(batch([1]), spec, **SETTINGS)
    handle.remove()
    assert seen == ["sdpa"] * NEW


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_renumbered_positions_have_no_gaps_at_any_layer(pruner: Pruner, method: str) -> None:
    """Every row's tokens are counted from 0 at each layer, in the prompt and in later steps."""
    spec = PruneSpec(method=method, budget=Budget(ratio=0.3), positions="renumber")
    prepared = pruner.prepare(batch([1, 2, 0]), spec)
    decoder = pruner.adapter.language_model()
    given: dict[int, list[torch.Tensor]] = {}
    assert prepared.stages is not None
    with StageDriver(pruner.adapter, prepared.stages):
        handles = [
            layer.register_forward_pre_hook(
                lambda layer, args, kwargs, index=index: given.setdefault(index, []).append(
                    kwargs["position_ids"]
                ),
                with_kwargs=True,
            )
            for index, layer in enumerate(decoder.layers)
        ]
        pruner.model.generate(**prepared.inputs, **SETTINGS)
    for handle in handles:
        handle.remove()
    for row, report in enumerate(prepared.reports):
        for index, held in enumerate(report.layer_tokens):
            prompt, *steps = given[index]
            assert prompt[row, -held:].tolist() == list(range(held))
            assert [step[row].item() for step in steps] == list(range(held, held + NEW - 1))
    assert len(set(prepared.reports[0].layer_tokens)) > 1


def test_methods_check_that_the_decoder_supports_stages() -> None:
    model = build()
    model.config.text_config.sliding_window = 8
    for spec in (
        SPEC,
        PruneSpec(method="pyramiddrop", budget=Budget(ratio=0.5)),
        PruneSpec(method="sppruner", budget=Budget(ratio=0.5), options={"mode": "pre+mid"}),
    ):
        with pytest.raises(MissingSignal, match="inside the decoder"):
            Pruner(model).check(spec)


def test_every_token_keeps_its_original_position(pruner: Pruner) -> None:
    """The arguments of a layer after a stage are consistent: rotary embeddings are those of the
    positions, which are an ordered subset of the full prompt's with its last one."""
    inputs, decoder = batch([1, 2, 0]), pruner.adapter.language_model()
    given: list[dict[str, Any]] = []
    prepared = pruner.prepare(inputs, SPEC)
    assert prepared.stages is not None
    with StageDriver(pruner.adapter, prepared.stages):
        handle = decoder.layers[2].register_forward_pre_hook(
            lambda layer, args, kwargs: given.append({"hidden": args[0]} | kwargs),
            with_kwargs=True,
        )
        pruner.model.generate(**prepared.inputs, **SETTINGS)
    handle.remove()
    prompt, *steps = given
    assert prompt["hidden"].shape[1] < inputs["input_ids"].shape[1]
    for rotary, expected in zip(
        prompt["position_embeddings"],
        decoder.rotary_emb(prompt["hidden"], prompt["position_ids"]),
        strict=True,
    ):
        assert torch.equal(rotary, expected)
    for row, report in enumerate(prepared.reports):
        positions = prompt["position_ids"][row, -report.layer_tokens[2] :].tolist()
        length = report.prompt_tokens_dense
        assert positions == sorted(set(positions))
        assert positions[-1] == length - 1
        assert [step["position_ids"][row].item() for step in steps] == list(
            range(length, length + NEW - 1)
        )


def test_code_compiled_without_stages_does_not_run_in_their_place(pruner: Pruner) -> None:
    """On accelerators `generate` compiles static-cache steps, and compiled code ignores hooks."""
    compiled = CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compiled} | SETTINGS
    every_token = PruneSpec(method="grid")
    dense = pruner.generate(batch([1, 2]), every_token, **static)
    expected = pruner.generate(batch([1, 2]), SPEC, **SETTINGS)
    staged = pruner.generate(batch([1, 2]), SPEC, **static)
    assert torch.equal(staged.tokens_BT, expected.tokens_BT)
    again = pruner.generate(batch([1, 2]), every_token, **static)
    assert torch.equal(again.tokens_BT, dense.tokens_BT)
    assert not torch.equal(dense.tokens_BT, expected.tokens_BT)
