"""Suite `selection`: cost of token selection beside the prefill it shortens, at 7B widths.

One decoder layer of a 7B model fits on machines that cannot hold the whole model, and all layers
have the same cost: the prefill is timed on one layer of random weights and multiplied by the number
of layers. Selection is timed in full, on random features of the model's widths. Both run in turn in
one process, with the same precision and thread count.
Shapes: N visual tokens, D decoder width, V encoder width, S prompt tokens; 2: row and column.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    Qwen2_5_VLConfig,
)

from jobs.suites.result import describe_machine, summarise_rounds
from jobs.suites.shapes import LLAVA_7B, QWEN_7B, ModelWidths
from sppruner import Budget, PruneSpec
from sppruner.adapters import capabilities
from sppruner.capabilities import Capabilities
from sppruner.resolved_spec import selector_on
from sppruner.signals import ATTENTION, KEYS
from sppruner.types import VisualTokens

_RATIO = 0.222
METHODS = ("sppruner", "fsr", "prunesid", "visionzip", "vispruner", "divprune", "cdpruner", "topk")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptShape:
    """Lengths and widths of one prompt."""

    model: str
    """Published model with these widths."""
    widths: ModelWidths
    """Widths of decoder and tower."""
    encoder_width: int
    """Width of the encoder states that selectors see."""
    grid: int
    """Visual tokens along each side of the image."""
    text_tokens: int
    """Text tokens of the prompt."""
    can: Capabilities
    """What the model can do; some methods depend on it."""

    @property
    def visual_tokens(self) -> int:
        return self.grid**2


def list_published_prompts() -> list[PromptShape]:
    """Prompts of 576 and 1,296 visual tokens at the widths of LLaVA-1.5-7B and Qwen2.5-VL-7B."""
    llava = PromptShape(
        model="LLaVA-1.5-7B",
        widths=LLAVA_7B,
        encoder_width=LLAVA_7B.tower_hidden,
        grid=24,
        text_tokens=60,
        can=capabilities(LlavaConfig()),
    )
    qwen = PromptShape(
        model="Qwen2.5-VL-7B",
        widths=QWEN_7B,
        encoder_width=4 * QWEN_7B.tower_hidden,  # the tower merges four patches into one token
        grid=24,
        text_tokens=30,
        can=capabilities(Qwen2_5_VLConfig()),
    )
    return [replace(prompt, grid=grid) for prompt in (llava, qwen) for grid in (24, 36)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionCase:
    """One method on one prompt; seconds are medians over the rounds."""

    model: str
    """Published model with the prompt's widths."""
    visual_tokens: int
    """Visual tokens before pruning."""
    method: str
    """Pruning method."""
    rounds: int
    """Timed rounds."""
    select_seconds: float
    """Selection of one image."""
    prefill_seconds: float
    """Dense prefill: one layer's time multiplied by the number of layers."""
    prefill_seconds_pruned: float
    """The same with the kept tokens only."""
    share_of_prefill: float
    """Median over rounds of selection over dense prefill."""
    share_low: float
    """Smallest share of any round."""
    share_high: float
    """Largest share of any round."""


def _make_tokens(prompt: PromptShape, dtype: torch.dtype) -> VisualTokens:
    """Random visual tokens with the structure of real ones: a smooth map plus noise."""
    generator = torch.Generator().manual_seed(0)

    def smooth(width: int) -> Tensor:
        coarse = torch.randn(1, width, 6, 6, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (prompt.grid, prompt.grid), mode="bilinear")
        noise = torch.randn(prompt.visual_tokens, width, generator=generator)
        return (fine[0].flatten(1).T + 0.3 * noise).to(dtype)

    cells = torch.arange(prompt.grid)
    return VisualTokens(
        features_ND=smooth(prompt.widths.hidden),
        hidden_NV=smooth(prompt.encoder_width),
        coords_N2=torch.cartesian_prod(cells, cells),
        signals={
            ATTENTION: torch.rand(prompt.visual_tokens, generator=generator) ** 4,
            KEYS: smooth(64).float(),
        },
        relevance_N=torch.rand(prompt.visual_tokens, generator=generator),
    )


def _build_layer(prompt: PromptShape, dtype: torch.dtype) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=prompt.widths.hidden,
        intermediate_size=prompt.widths.intermediate,
        num_hidden_layers=1,
        num_attention_heads=prompt.widths.heads,
        num_key_value_heads=prompt.widths.kv_heads,
    )
    return LlamaModel(config).to(dtype).eval()


def _prepare_selection(
    method: str, prompt: PromptShape, tokens: VisualTokens, kept: int
) -> Callable[[], object]:
    selector = selector_on(PruneSpec(method=method, budget=Budget(ratio=_RATIO)), prompt.can)
    assert selector is not None
    return lambda: selector.select([tokens], [kept])


def _time_rounds(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each task per round, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(-1, rounds):
        for name, run in tasks.items():
            started = time.perf_counter()
            run()
            if number >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def _prepare_prefill(model: LlamaModel, tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    states_1SD = torch.randn(1, tokens, model.config.hidden_size).to(dtype)
    return lambda: model(
        inputs_embeds=states_1SD, past_key_values=DynamicCache(config=model.config)
    )


@torch.no_grad()
def run_selection_suite(
    *,
    quick: bool,
    console: Console,
    dtype: torch.dtype = torch.float32,
    methods: Sequence[str] = METHODS,
    prompts: Sequence[PromptShape] | None = None,
) -> dict[str, Any]:
    """Times every method on every prompt. `ratios` holds each case's share of the dense prefill;
    `pruner_share` is the largest share of `sppruner`."""
    rounds = 2 if quick else 7
    machine = describe_machine()
    cases: list[SelectionCase] = []
    shares: dict[str, dict[str, float]] = {}
    for prompt in prompts or list_published_prompts():
        console.print(f"{prompt.model}, {prompt.visual_tokens} visual tokens", highlight=False)
        tokens = _make_tokens(prompt, dtype)
        kept = Budget(ratio=_RATIO).count(prompt.visual_tokens)
        layer = _build_layer(prompt, dtype)
        dense = _prepare_prefill(layer, prompt.visual_tokens + prompt.text_tokens, dtype)
        pruned = _prepare_prefill(layer, kept + prompt.text_tokens, dtype)
        selectors = {name: _prepare_selection(name, prompt, tokens, kept) for name in methods}
        times = _time_rounds({"dense": dense, "pruned": pruned} | selectors, rounds)
        for name in selectors:
            share = summarise_rounds(
                [
                    selecting / (prompt.widths.layers * prefilling)
                    for selecting, prefilling in zip(times[name], times["dense"], strict=True)
                ]
            )
            shares[f"{name} {prompt.model} {prompt.visual_tokens}"] = share
            cases.append(
                SelectionCase(
                    model=prompt.model,
                    visual_tokens=prompt.visual_tokens,
                    method=name,
                    rounds=rounds,
                    select_seconds=median(times[name]),
                    prefill_seconds=prompt.widths.layers * median(times["dense"]),
                    prefill_seconds_pruned=prompt.widths.layers * median(times["pruned"]),
                    share_of_prefill=share["value"],
                    share_low=share["low"],
                    share_high=share["high"],
                )
            )
    sppruner_shares = [share for name, share in shares.items() if name.startswith("sppruner ")]
    if sppruner_shares:
        shares["pruner_share"] = max(sppruner_shares, key=lambda share: share["value"])
    return {
        "suite": "selection",
        "machine": machine | {"dtype": str(dtype).removeprefix("torch.")},
        "cases": [asdict(case) for case in cases],
        "ratios": shares,
    }
