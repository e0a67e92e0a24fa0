"""Suite `selection`: the result has the documented shape, and its figures are consistent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from jobs.suites.selection import PromptShape, list_published_prompts, run_selection_suite
from jobs.suites.shapes import LLAVA_7B

WIDTHS = replace(
    LLAVA_7B, layers=3, hidden=64, heads=4, kv_heads=2, intermediate=96, tower_hidden=32
)
CAN = list_published_prompts()[0].can
SMALL = PromptShape(model="small", widths=WIDTHS, encoder_width=32, grid=8, text_tokens=5, can=CAN)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    methods = ("sppruner", "topk")
    return run_selection_suite(
        quick=True, console=Console(quiet=True), methods=methods, prompts=[SMALL]
    )


def test_every_method_is_timed_at_every_shape_beside_the_same_prefill(
    result: dict[str, Any],
) -> None:
    assert result["suite"] == "selection"
    assert [case["method"] for case in result["cases"]] == ["sppruner", "topk"]
    assert len({case["prefill_seconds"] for case in result["cases"]}) == 1
    for case in result["cases"]:
        assert case["visual_tokens"] == 64
        assert 0 < case["share_low"] <= case["share_of_prefill"] <= case["share_high"]


def test_the_headline_ratio_is_the_worst_shape_of_sppruner(result: dict[str, Any]) -> None:
    ratios = result["ratios"]
    assert ratios["pruner_share"] == ratios["sppruner small 64"]


def test_the_published_prompts_have_the_sizes_of_the_models() -> None:
    prompts = {(p.model, p.visual_tokens): p for p in list_published_prompts()}
    assert set(prompts) == {
        (model, n) for model in ("LLaVA-1.5-7B", "Qwen2.5-VL-7B") for n in (576, 1296)
    }
    llava, qwen = prompts["LLaVA-1.5-7B", 576], prompts["Qwen2.5-VL-7B", 1296]
    assert (llava.can.merged, qwen.can.merged) == (False, True)  # prunesid's states depend on it
    assert (llava.widths.hidden, llava.widths.layers, llava.widths.intermediate) == (
        4096,
        32,
        11008,
    )
    assert (qwen.widths.hidden, qwen.widths.layers, qwen.widths.intermediate) == (3584, 28, 18944)
    assert (qwen.widths.kv_heads, llava.encoder_width, qwen.encoder_width) == (4, 1024, 5120)
