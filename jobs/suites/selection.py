"""What selecting tokens costs beside the prefill it shortens, at the widths of 7B models.

A whole 7B model does not fit every machine, one of its decoder layers does: the prefill is timed
on one layer of random weights and multiplied by the number of layers; all layers are alike. The
selection is timed whole, on random features of the model's widths. Both run in turns, in one
process, in the same precision and threads.
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
from transformers import DynamicCache, LlamaConfig, LlamaModel

from jobs.suites.result import machine, ratio
from jobs.suites.shapes import LLAVA_7B, QWEN_7B, Widths
from sppruner import Budget, PruneSpec
from sppruner.selectors import selector_for
from sppruner.signals import ATTENTION, KEYS
from sppruner.types import VisualTokens

_RATIO = 0.222
METHODS = ("sppruner", "fsr", "prunesid", "visionzip", "vispruner", "divprune", "cdpruner", "topk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a model of these widths. encoder_width: of what its selectors see."""

    model: str
    widths: Widths
    encoder_width: int
    grid: int
    text_tokens: int

    @property
    def visual_tokens(self) -> int:
        return self.grid**2


# Qwen's tower merges four patches into a token.
_LLAVA = Prompt(
    model="LLaVA-1.5-7B",
    widths=LLAVA_7B,
    encoder_width=LLAVA_7B.tower_hidden,
    grid=24,
    text_tokens=60,
)
_QWEN = Prompt(
    model="Qwen2.5-VL-7B",
    widths=QWEN_7B,
    encoder_width=4 * QWEN_7B.tower_hidden,
    grid=24,
    text_tokens=30,
)


def published() -> list[Prompt]:
    """576 and 1,296 visual tokens at the widths of LLaVA-1.5-7B and Qwen2.5-VL-7B."""
    return [replace(prompt, grid=grid) for prompt in (_LLAVA, _QWEN) for grid in (24, 36)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One method at one prompt. Seconds are medians over the rounds; prefill_seconds is the layer's
    times the number of layers, with every visual token and with those kept."""

    model: str
    visual_tokens: int
    method: str
    rounds: int
    select_seconds: float
    prefill_seconds: float
    prefill_seconds_pruned: float
    share_of_prefill: float
    share_low: float
    share_high: float


def _image(prompt: Prompt, dtype: torch.dtype) -> VisualTokens:
    """Features with the structure real ones have: a smooth map plus noise."""
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


def _layer(prompt: Prompt, dtype: torch.dtype) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=prompt.widths.hidden,
        intermediate_size=prompt.widths.intermediate,
        num_hidden_layers=1,
        num_attention_heads=prompt.widths.heads,
        num_key_value_heads=prompt.widths.kv_heads,
    )
    return LlamaModel(config).to(dtype).eval()


def _select(method: str, image: VisualTokens, kept: int) -> Callable[[], object]:
    selector = selector_for(PruneSpec(method=method, budget=Budget(ratio=_RATIO)))
    assert selector is not None
    return lambda: selector.select([image], [kept])


def _in_turns(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each piece of work per round; one more round before them is not counted."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(-1, rounds):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            if number >= 0:
                times[name].append(time.perf_counter() - began)
    return times


def _prefill(model: LlamaModel, tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    states_1SD = torch.randn(1, tokens, model.config.hidden_size).to(dtype)
    return lambda: model(
        inputs_embeds=states_1SD, past_key_values=DynamicCache(config=model.config)
    )


@torch.no_grad()
def selection(
    *,
    quick: bool,
    told: Console,
    dtype: torch.dtype = torch.float32,
    methods: Sequence[str] = METHODS,
    prompts: Sequence[Prompt] | None = None,
) -> dict[str, Any]:
    """Every method at every prompt; `ratios` holds the share of the dense prefill per case, and
    `pruner_share` the largest one of `sppruner`."""
    rounds = 2 if quick else 7
    about = machine()
    cases: list[Case] = []
    shares: dict[str, dict[str, float]] = {}
    for prompt in prompts or published():
        told.print(f"{prompt.model}, {prompt.visual_tokens} visual tokens", highlight=False)
        image = _image(prompt, dtype)
        kept = Budget(ratio=_RATIO).count(prompt.visual_tokens)
        layer = _layer(prompt, dtype)
        dense = _prefill(layer, prompt.visual_tokens + prompt.text_tokens, dtype)
        pruned = _prefill(layer, kept + prompt.text_tokens, dtype)
        selectors = {name: _select(name, image, kept) for name in methods}
        times = _in_turns({"dense": dense, "pruned": pruned} | selectors, rounds)
        for name in selectors:
            part = ratio(
                [
                    took / (prompt.widths.layers * whole)
                    for took, whole in zip(times[name], times["dense"], strict=True)
                ]
            )
            shares[f"{name} {prompt.model} {prompt.visual_tokens}"] = part
            cases.append(
                Case(
                    model=prompt.model,
                    visual_tokens=prompt.visual_tokens,
                    method=name,
                    rounds=rounds,
                    select_seconds=median(times[name]),
                    prefill_seconds=prompt.widths.layers * median(times["dense"]),
                    prefill_seconds_pruned=prompt.widths.layers * median(times["pruned"]),
                    share_of_prefill=part["value"],
                    share_low=part["low"],
                    share_high=part["high"],
                )
            )
    ours = [part for name, part in shares.items() if name.startswith("sppruner ")]
    if ours:
        shares["pruner_share"] = max(ours, key=lambda part: part["value"])
    return {
        "suite": "selection",
        "machine": about | {"dtype": str(dtype).removeprefix("torch.")},
        "cases": [asdict(case) for case in cases],
        "ratios": shares,
    }
