"""Suite `peers`: every participant does the same work, or the suite says which does not. vLLM is a
stand-in here, and so are the two commands; `tests/sppruner/integrations/vllm` runs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.errors import FleetUnavailable, UsageError
from jobs.suites import peer, peers
from jobs.suites.corpus_peers import Labelled
from jobs.suites.peers import run_peers_suite
from jobs.suites.shapes import SHAPES
from tests.jobs.suites.stand_in import StandIn

QUIET = Console(quiet=True)
SHAPE = replace(SHAPES["tiny"], quick_images=2)
ROWS, TOKENS = 16, 8
SECONDS = {"job": 2.0, "ray": 8.0, "ray dense": 32.0}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(peer, "_SETTLED_SECONDS", 0.0)
    return StandIn(tmp_path, monkeypatch)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts stand-ins in place of both commands; `change` is made to what the job reports."""

    def install(**change: Any) -> None:
        def label_by_job(python: Path, inputs: Any, corpus: Path, output: Path, **_: Any) -> Any:
            assert list(corpus.glob("*.parquet"))
            lengths = sorted(len(ids) - dropped(inputs) for ids in inputs.prompts[:ROWS])
            found = Labelled(
                seconds=SECONDS["job"], prompt_tokens=lengths, new_tokens=[TOKENS] * ROWS
            )
            return replace(found, **change)

        def label_by_ray_data_llm(
            python: Path, inputs: Any, corpus: Path, output: Path, *, spec: Any, **_: Any
        ) -> Any:
            cut = 0 if spec.is_dense else dropped(inputs)
            return Labelled(
                seconds=SECONDS["ray dense" if spec.is_dense else "ray"],
                prompt_tokens=sorted(len(ids) - cut for ids in inputs.prompts[:ROWS]),
                new_tokens=[TOKENS] * ROWS,
            )

        monkeypatch.setattr(peers, "label_by_job", label_by_job)
        monkeypatch.setattr(peers, "label_by_ray_data_llm", label_by_ray_data_llm)

    return install


def dropped(inputs: Any) -> int:
    """Visual tokens that 22.2 % leaves out of an image."""
    return 144 - 32


def test_every_participant_has_a_case_and_ratios_are_of_the_right_two(
    stand_in: StandIn, commands: Callable[..., None]
) -> None:
    commands()
    result = run_peers_suite(SHAPE, quick=True, console=QUIET, peer=stand_in.python)
    cases = {case["case"]: case for case in result["cases"]}
    budgets = ("dense", "33.3 %", "22.2 %", "11.1 %")
    assert list(cases) == [
        *(f"vLLM {budget}" for budget in budgets),
        *(f"engine {budget}" for budget in budgets),
        *("from memory 22.2 %", "job 22.2 %", "Ray Data LLM 22.2 %", "Ray Data LLM dense"),
    ]
    speeds = {name: case["images_per_second"] for name, case in cases.items()}
    assert speeds["job 22.2 %"]["value"] == ROWS / SECONDS["job"]
    assert cases["vLLM dense"]["equal_answers"] == 0  # it always says the same
    ratios = result["ratios"]
    assert ratios["job_vs_ray_data_llm"]["value"] == 16.0
    assert ratios["job_vs_ray_data_llm_pruned"]["value"] == 4.0
    for ratio, above, below in [
        ("vllm_pruned_vs_vllm_dense", "vLLM 22.2 %", "vLLM dense"),
        ("engine_dense_vs_vllm_dense", "engine dense", "vLLM dense"),
        ("engine_pruned_vs_vllm_pruned", "engine 22.2 %", "vLLM 22.2 %"),
        ("job_vs_bare_vllm", "job 22.2 %", "from memory 22.2 %"),
    ]:
        least = speeds[above]["low"] / speeds[below]["high"]
        most = speeds[above]["high"] / speeds[below]["low"]
        assert least <= ratios[ratio]["low"] <= ratios[ratio]["high"] <= most, ratio


def test_vllm_dense_runs_without_the_plugin(
    stand_in: StandIn, commands: Callable[..., None]
) -> None:
    commands()
    run_peers_suite(SHAPE, quick=True, console=QUIET, peer=stand_in.python)
    started = [note for note in stand_in.notes if "settings" in note]
    assert [note["environment"].get("VLLM_PLUGINS") for note in started] == [None, ""]
    assert started[0]["settings"] == started[1]["settings"]


def test_a_peer_with_other_prompts_is_named(
    stand_in: StandIn, commands: Callable[..., None]
) -> None:
    commands()
    stand_in.configure(fault="one more")
    with pytest.raises(FleetUnavailable, match="prompt tokens, and we read"):
        run_peers_suite(SHAPE, quick=True, console=QUIET, peer=stand_in.python)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_tokens": [1] * ROWS},
        {"prompt_tokens": [], "new_tokens": []},
        {"new_tokens": [TOKENS] * (ROWS - 1) + [TOKENS - 1]},
    ],
)
def test_a_job_that_did_other_work_is_no_measurement(
    stand_in: StandIn, commands: Callable[..., None], change: dict[str, Any]
) -> None:
    commands(**change)
    with pytest.raises(FleetUnavailable, match=r"label_by_job: .* rows of"):
        run_peers_suite(SHAPE, quick=True, console=QUIET, peer=stand_in.python)


def test_without_vllm_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"make \.venv-vllm"):
        run_peers_suite(SHAPE, quick=True, console=QUIET)
