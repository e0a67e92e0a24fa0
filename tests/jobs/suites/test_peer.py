"""The peer of suite `engine`: its worker, in a real process around a stand-in for vLLM, receives
the same requests as our engines and is timed in turn; every failure has one clear error."""

from __future__ import annotations

import ast
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from cluster.errors import FleetUnavailable, UsageError
from jobs.benchmark import format_markdown
from jobs.suites import passes, peer
from jobs.suites.engine import run_engine_suite
from jobs.suites.passes import EngineMode, EngineTiming, generate_tokens, time_rounds
from jobs.suites.peer import NAME, Peer, open_peer
from jobs.suites.random_models import build
from jobs.suites.shapes import SHAPES, draw_scenes
from sppruner.engine import Request, SamplingParams
from sppruner.models.loading import LoadedModel
from sppruner.prompts import build_inputs
from tests.jobs.suites.stand_in import StandIn

QUIET = Console(quiet=True)
TOKENS = 8
PROMPT = "what is the shape of the red object"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(peer, "_SETTLED_SECONDS", 0.0)
    return StandIn(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return build(SHAPES["tiny"])


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Three that are timed together and one that is timed singly."""
    generation = SamplingParams(max_new_tokens=TOKENS)
    return [
        Request(id=str(n), prompt=PROMPT, images=(image,), generation=generation)
        for n, image in enumerate(draw_scenes(SHAPES["tiny"], 4))
    ]


@pytest.fixture
def connect(
    stand_in: StandIn, loaded: LoadedModel, requests: list[Request]
) -> Callable[[ExitStack], Peer]:
    return lambda stack: stack.enter_context(open_peer(stand_in.python, loaded, requests, slots=2))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ended(pid: int) -> bool:
    """Whether the process has ended, or does within a few seconds."""
    until = time.monotonic() + 5
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not alive(pid)


def test_a_peer_has_its_own_case_and_ratios(stand_in: StandIn, loaded: LoadedModel) -> None:
    shape = replace(SHAPES["tiny"], quick_images=4)
    requests = [
        Request(
            id=str(n),
            prompt=PROMPT,
            images=(image,),
            generation=SamplingParams(max_new_tokens=TOKENS),
        )
        for n, image in enumerate(draw_scenes(shape, 4))
    ]
    ours = generate_tokens(loaded, EngineMode(name="engine", rows=4, continuous=True), requests)
    ours[2][-1] += 1
    stand_in.configure(answers=ours)
    result = run_engine_suite(shape, quick=True, console=QUIET, peer=stand_in.python)
    *_, dense, pruned, other = result["cases"]
    assert (other["case"], other["batch_rows"]) == (NAME, 4)
    speed = other["images_per_second"]
    assert 0 < speed["low"] <= speed["value"] <= speed["high"] < 4 / 0.01
    unknown = {name for name, value in other.items() if value is None}
    assert unknown == {
        *("vision_ms", "pruner_ms", "prefill_ms", "decode_ms", "other_ms"),
        *("peak_memory_mib", "kv_bytes"),
    }
    for name, case in (("dense", dense), ("pruned", pruned)):
        ratio = result["ratios"][f"engine_{name}_vs_peer"]
        above, below = case["images_per_second"], speed
        assert ratio["low"] >= above["low"] / below["high"]
        assert ratio["high"] <= above["high"] / below["low"]
    assert result["machine"]["peer_equal_answers"] == 0.75
    assert "vLLM 0" in result["machine"]["peer"]
    (line,) = (
        line for line in format_markdown(result).splitlines() if line.startswith(f"| {NAME} |")
    )
    assert line.endswith("|" + "  |" * 7)
    # One batch to compare answers, then both rounds.
    kinds = [next(iter(note)) for note in stand_in.notes]
    assert kinds == ["settings", "batch", *("single", "batch") * 2, "exited"]


def test_rounds_visit_our_modes_and_the_peer_in_both_orders(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, requests: list[Request]
) -> None:
    order = []
    time_round = EngineTiming(images_per_second=1.0, first_token=1.0, inter_token=1.0)

    def turn(name: str) -> EngineTiming:
        order.append(name)
        return time_round

    monkeypatch.setattr(passes, "_time_mode", lambda loaded, engine, mode, *_: turn(mode.name))
    modes = [
        EngineMode(name="generate", rows=1),
        EngineMode(name="engine", rows=2, continuous=True),
    ]
    *together, single = requests
    found = time_rounds(
        loaded,
        modes,
        together,
        single,
        rounds=2,
        warmup_rounds=1,
        console=QUIET,
        others={NAME: lambda: turn(NAME)},
    )
    forward = ["generate", "engine", NAME]
    assert order == [*forward[::-1], *forward, *forward[::-1]]
    assert [set(row) for row in found] == [set(forward)] * 2


def test_the_peer_gets_our_prompts_pixels_and_threads_and_caches_nothing(
    stand_in: StandIn,
    connect: Callable[[ExitStack], Peer],
    loaded: LoadedModel,
    requests: list[Request],
) -> None:
    with ExitStack() as stack:
        connect(stack).time_round()
    received, single, batch, _ = stand_in.notes
    pixels = [request.images[0].convert("RGB").tobytes().hex() for request in requests]
    assert [single["single"], *batch["batch"]] == [pixels[-1], *pixels[:-1]]
    settings = received["settings"]
    assert settings["dtype"] == "float32"
    assert settings["max_num_seqs"] == 2
    assert settings["enable_prefix_caching"] is False
    assert settings["mm_processor_cache_gb"] == 0
    longest = len(build_inputs(loaded.processor, [PROMPT], [requests[0].images[0]])["input_ids"][0])
    assert longest + TOKENS <= settings["max_model_len"] <= 4096
    cores = received["environment"]["VLLM_CPU_OMP_THREADS_BIND"].split(",")
    assert {int(core) for core in cores} <= os.sched_getaffinity(0)
    assert int(received["environment"]["OMP_NUM_THREADS"]) == torch.get_num_threads()
    tower = [name for name in received["weights"] if name.startswith("vision_tower.")]
    assert tower
    assert all(name.startswith("vision_tower.vision_model.") for name in tower)
    assert len(received["weights"]) == len(set(loaded.model.state_dict()) - {"lm_head.weight"})


def test_a_single_request_has_its_own_times(connect: Callable[[ExitStack], Peer]) -> None:
    """The stand-in is slower to its first token than between tokens."""
    with ExitStack() as stack:
        time_round = connect(stack).time_round()
    assert time_round.first_token >= 0.06
    assert 0.01 <= time_round.inter_token < time_round.first_token
    assert 0 < time_round.images_per_second <= 3 / 0.01


def test_answer_returns_only_after_the_peer_sleeps(
    connect: Callable[[ExitStack], Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        other = connect(stack)
        monkeypatch.setattr(peer, "_SETTLED_SECONDS", 0.3)
        started = time.perf_counter()
        answers = other.answer()
        assert time.perf_counter() - started >= 0.3 + answers.seconds


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("one more", r"request 0: it read 156 prompt tokens, and we read 155:"),
        ("other words", r"request 1: it read 155 prompt tokens, and we read 155 others:"),
        ("ends early", r"request 0: 7 tokens generated instead of 8:"),
        ("dies", r"ended with status 3\.(.|\n)*out of luck"),
    ],
)
def test_answers_that_cannot_be_compared_are_refused(
    stand_in: StandIn, connect: Callable[[ExitStack], Peer], fault: str, error: str
) -> None:
    stand_in.configure(fault=fault)
    with pytest.raises(FleetUnavailable, match=error), ExitStack() as stack:
        connect(stack).answer()


def test_a_peer_that_died_between_two_rounds_is_named(
    stand_in: StandIn, connect: Callable[[ExitStack], Peer]
) -> None:
    stand_in.configure(fault="dies later")
    with ExitStack() as stack:
        other = connect(stack)
        other.answer()
        worker, _ = stand_in.notes[0]["pids"]
        assert ended(worker)
        with pytest.raises(FleetUnavailable, match=r"ended with status 4\."):
            other.answer()


def test_an_interpreter_without_vllm_is_named_with_the_reason(
    loaded: LoadedModel, requests: list[Request]
) -> None:
    python = Path(sys.executable)
    with (
        pytest.raises(FleetUnavailable, match=rf"--peer {python}(.|\n)*No module named 'vllm'"),
        open_peer(python, loaded, requests, slots=2),
    ):
        pass


@pytest.mark.parametrize("name", ["absent", "."])
def test_a_path_that_is_no_interpreter_is_a_usage_error(
    name: str, tmp_path: Path, loaded: LoadedModel, requests: list[Request]
) -> None:
    python = tmp_path / name
    with (
        pytest.raises(UsageError, match=rf"--peer {python}: "),
        open_peer(python, loaded, requests, slots=2),
    ):
        pass


def test_a_model_on_a_gpu_has_no_peer(requests: list[Request]) -> None:
    on_gpu: Any = SimpleNamespace(model=SimpleNamespace(device=torch.device("cuda")))
    with (
        pytest.raises(UsageError, match="CPU build"),
        open_peer(Path(sys.executable), on_gpu, requests, slots=2),
    ):
        pass


@pytest.mark.parametrize("failing", [False, True])
def test_no_process_and_no_folder_is_left_behind(
    stand_in: StandIn, connect: Callable[[ExitStack], Peer], failing: bool
) -> None:
    """Child processes of vLLM included: the stand-in starts one that would sleep for a minute."""
    with ExitStack() as stack:
        if failing:
            stack.enter_context(pytest.raises(KeyboardInterrupt))
        connect(stack)
        received = stand_in.notes[0]
        assert all(alive(pid) for pid in received["pids"])
        assert Path(received["folder"]).is_dir()
        if failing:
            raise KeyboardInterrupt
    assert all(ended(pid) for pid in received["pids"])
    assert not Path(received["folder"]).exists()
    # Without a failure vLLM has time to exit by itself.
    assert failing or stand_in.notes[-1] == {"exited": True}


def test_the_worker_imports_nothing_that_vllm_does_not_bring() -> None:
    source = Path(peer.__file__).with_name("peer_worker.py").read_text()
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - sys.stdlib_module_names == {"PIL"}
