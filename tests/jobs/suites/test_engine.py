"""Suite `engine`: the result has the documented shape, phase times sum to the pass, every timer
hook exists and is called, and scaled models keep the proportions of the published ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from rich.console import Console

import sppruner.pruner
import sppruner.selection
from jobs.benchmark import format_markdown, main
from jobs.suites.engine import run_engine_suite
from jobs.suites.passes import EngineMode, time_rounds
from jobs.suites.phases import PhaseTimes, _wrap, list_hooks, time_phases
from jobs.suites.random_models import build, build_config_and_processor
from jobs.suites.shapes import SHAPES, ModelShape, ModelWidths, draw_scenes
from sppruner import DENSE, Budget, PruneSpec
from sppruner.adapters import cost_of
from sppruner.adapters.llava import LlavaAdapter
from sppruner.cost import ImageShape
from sppruner.engine import BatchEngine, ContinuousEngine, Request, SamplingParams
from sppruner.models.loading import LoadedModel

QUIET = Console(quiet=True)
SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.222))
SMALL = {
    family: replace(
        SHAPES[family],
        side=112,
        widths=ModelWidths(
            family=family,
            layers=2,
            hidden=64,
            heads=2,
            kv_heads=2 if family == "llava" else 1,
            intermediate=96,
            vocabulary=0,  # at least the tokenizer's
            tower_layers=3,
            tower_hidden=32,
            tower_heads=2,
            tower_intermediate=48,
            full_attention=2,
        ),
    )
    for family in ("llava", "qwen")
}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    shape = replace(SHAPES["tiny"], quick_images=4)
    found: dict[str, Any] = json.loads(
        json.dumps(run_engine_suite(shape, quick=True, console=QUIET))
    )
    return found


@pytest.fixture(scope="module", params=SMALL)
def small(request: pytest.FixtureRequest) -> tuple[LoadedModel, ModelShape]:
    shape = SMALL[request.param]
    return build(shape), shape


def build_requests(
    shape: ModelShape, images: int, *specs: PruneSpec, tokens: int = 5
) -> list[Request]:
    return [
        Request(
            id=f"{number}",
            prompt="what is it " * (number + 1),
            images=(image,),
            spec=specs[number % len(specs)],
            generation=SamplingParams(max_new_tokens=tokens),
        )
        for number, image in enumerate(draw_scenes(shape, images))
    ]


def test_the_result_has_the_documented_shape_and_positive_figures(result: dict[str, Any]) -> None:
    assert list(result) == ["suite", "machine", "cases", "ratios"]
    assert result["suite"] == "engine"
    assert [case["case"] for case in result["cases"]] == [
        "generate batch 1",
        "generate best static batch",
        "engine dense",
        "engine sppruner 22.2 %",
    ]
    assert (result["machine"]["images"], result["machine"]["rounds"]) == (4, 2)
    for case in result["cases"]:
        for speed in ("images_per_second", "ttft_ms", "inter_token_ms"):
            found = case[speed]
            assert 0 < found["low"] <= found["value"] <= found["high"]
        for phase in ("vision_ms", "prefill_ms", "decode_ms", "other_ms", "kv_bytes"):
            assert case[phase] > 0
    assert set(result["ratios"]) == {
        "engine_dense_vs_static_batch",
        "engine_pruned_vs_dense",
        "pruner_share",
    }
    for ratio in result["ratios"].values():
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    assert result["ratios"]["pruner_share"]["high"] < 1


def test_generate_has_no_pruner_time_and_pruning_shrinks_the_kv_cache(
    result: dict[str, Any],
) -> None:
    single, static, dense, pruned = result["cases"]
    assert single["pruner_ms"] == static["pruner_ms"] == 0 < pruned["pruner_ms"]
    assert single["kv_bytes"] == static["kv_bytes"] == dense["kv_bytes"] > pruned["kv_bytes"]


def test_the_markdown_has_a_line_for_every_case_and_ratio(result: dict[str, Any]) -> None:
    lines = format_markdown(result).splitlines()
    for name in [case["case"] for case in result["cases"]] + list(result["ratios"]):
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1


def test_both_engines_generate_the_same_tokens_up_to_max_new_tokens(
    small: tuple[LoadedModel, ModelShape],
) -> None:
    loaded, shape = small
    requests = build_requests(shape, 4, DENSE, SPEC)
    expected = BatchEngine(loaded, slots=1).run(requests)
    with closing(ContinuousEngine(loaded, slots=3, cache_bytes=0)) as continuous:
        found = continuous.run(requests)
    for one, other in zip(expected, found, strict=True):
        assert one.error_message is None
        assert one.completion_tokens == 5
        assert one.text
        assert replace(one, seconds=0.0) == replace(other, seconds=0.0)


def test_answers_of_the_embedded_model_have_the_full_length_too() -> None:
    """Its weights were trained to end after a word or two."""
    shape = SHAPES["tiny"]
    found = BatchEngine(build(shape)).run(build_requests(shape, 2, DENSE, SPEC, tokens=40))
    assert [one.completion_tokens for one in found] == [40, 40]


@pytest.mark.parametrize("spec", [DENSE, SPEC])
def test_the_measured_kv_cache_is_that_of_the_cost_model(
    small: tuple[LoadedModel, ModelShape], spec: PruneSpec
) -> None:
    loaded, shape = small
    requests = build_requests(shape, 1, spec)
    with closing(ContinuousEngine(loaded, slots=2, cache_bytes=0)) as continuous:
        for engine in (BatchEngine(loaded), continuous):
            with time_phases(loaded.model) as times:
                (found,) = engine.run(requests)
            assert found.cost is not None
            assert times.kv_bytes == found.cost.kv_bytes


def test_a_phase_within_another_keeps_its_seconds_to_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = count()
    monkeypatch.setattr("jobs.suites.phases.time.perf_counter", lambda: float(next(ticks)))
    times = PhaseTimes(wait=False)
    with times.measure("prefill"):
        with times.measure("vision"):
            pass
        times.charge()
    with times.measure("decode"):
        pass
    assert times.seconds == {
        "other": 2.0,
        "prefill": 3.0,
        "vision": 1.0,
        "decode": 1.0,
        "pruner": 0.0,
    }
    assert times.first_token == 6.0


def test_every_wrapped_attribute_exists_and_is_called_where_the_timers_wrap_it(
    small: tuple[LoadedModel, ModelShape],
) -> None:
    """The hooks are names: a function that is renamed or imported elsewhere would no longer be
    timed, and its time would count as another phase."""
    loaded, shape = small
    calls: Counter[str] = Counter()

    def count_calls(name: str) -> Callable[..., Any]:
        def wrapper(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return run(*args, **kwargs)

        return wrapper

    hooks = list_hooks(loaded.model)
    for owner, name, _ in hooks:
        assert callable(getattr(owner, name, None)), f"{owner} has no {name}"
    with ExitStack() as stack:
        for owner, name, _ in hooks:
            stack.enter_context(_wrap(owner, name, count_calls(name)))
        BatchEngine(loaded).run(build_requests(shape, 1, DENSE))
        with closing(ContinuousEngine(loaded, slots=2, cache_bytes=0)) as continuous:
            continuous.run(build_requests(shape, 2, DENSE, SPEC))
    assert {name for _, name, _ in hooks} == {name for name, number in calls.items() if number}


def test_a_hook_that_is_gone_stops_the_timers(
    small: tuple[LoadedModel, ModelShape], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _ = small
    monkeypatch.delattr(sppruner.pruner, "select")
    with pytest.raises(AttributeError, match="select"), time_phases(loaded.model):
        pass


def test_timers_are_removed_afterwards(small: tuple[LoadedModel, ModelShape]) -> None:
    loaded, shape = small
    with pytest.raises(ValueError, match="stop"), time_phases(loaded.model):
        raise ValueError("stop")
    assert "forward" not in vars(loaded.model)
    assert "get_image_features" not in vars(loaded.model.model)
    assert vars(sppruner.pruner)["select"] is sppruner.selection.select
    with time_phases(loaded.model) as times:
        pass
    BatchEngine(loaded).run(build_requests(shape, 1, SPEC))
    assert {phase for phase, seconds in times.seconds.items() if seconds} == {"other"}


def test_every_round_encodes_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SMALL["llava"]
    loaded = build(shape)
    *requests, single = build_requests(shape, 4, DENSE)
    encoded = []
    encode = LlavaAdapter.encode

    def counted(self: LlavaAdapter, inputs: Any, signals: frozenset[str]) -> Any:
        encoded.append(len(inputs["pixel_values"]))
        return encode(self, inputs, signals)

    monkeypatch.setattr(LlavaAdapter, "encode", counted)
    modes = [EngineMode(name="engine", rows=3, continuous=True, spec=SPEC)]
    timed = time_rounds(loaded, modes, requests, single, rounds=2, warmup_rounds=1, console=QUIET)
    assert len(timed) == 2
    assert sum(encoded) == 3 * len([*requests, single])


@pytest.mark.parametrize(
    ("name", "grid", "tokens", "billions"),
    [
        ("llava", 24, 576, 0.32),
        ("llava-7b", 24, 576, 6.48),
        ("qwen", 64, 1024, 0.31),
        ("qwen-7b", 64, 1024, 6.53),
    ],
)
def test_a_scaled_model_keeps_the_parts_of_the_published_one(
    name: str, grid: int, tokens: int, billions: float
) -> None:
    """Parameters of the decoder's layers, and what the tower takes of encoding and reading."""
    shape = SHAPES[name]
    assert shape.widths is not None
    config, processor = build_config_and_processor(shape, shape.widths)
    cost = cost_of(config)
    assert cost.decoder.layers * cost.decoder.layer(1, 0) / 2e9 == pytest.approx(billions, abs=5e-3)

    image = ImageShape(tiles=1, rows=grid, columns=grid, tokens=tokens)
    seen = cost.encoder.vision(image) + cost.encoder.projector(image)
    share = seen / (seen + cost.decoder.prefill([tokens] * cost.decoder.layers))
    assert share == pytest.approx(0.051 if name.startswith("llava") else 0.291, abs=0.01)

    ids = processor(text=processor.image_token, images=draw_scenes(shape, 1), return_tensors="pt")
    assert int((ids["input_ids"] == config.image_token_id).sum()) == tokens


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("shape", ["llava-7b", "qwen-7b"])
def test_a_whole_7b_model_is_refused_without_a_gpu(
    shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--suite", "engine", "--shape", shape]) == 2
    assert f"--shape {shape} needs a CUDA device" in capsys.readouterr().err
