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
from sppruner import Budget, PruneSpec
from sppruner.selectors import selector_for
from sppruner.signals import ATTENTION, KEYS
from sppruner.types import VisualTokens

_RATIO = 0.222
METHODS = ("sppruner", "fsr", "prunesid", "visionzip", "vispruner", "divprune", "cdpruner", "topk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's widths and one prompt of it."""

    model: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    encoder_width: int
    grid: int
    text_tokens: int

    @property
    def visual_tokens(self) -> int:
        return self.grid**2


_LLAVA = Shape(
    model="LLaVA-1.5-7B",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    intermediate=11008,
    encoder_width=1024,
    grid=24,
    text_tokens=60,
)
_QWEN = Shape(
    model="Qwen2.5-VL-7B",
    layers=28,
    hidden=3584,
    heads=28,
    kv_heads=4,
    intermediate=18944,
    encoder_width=5120,
    grid=24,
    text_tokens=30,
)


def published_shapes() -> list[Shape]:
    """576 and 1,296 visual tokens at the widths of LLaVA-1.5-7B and Qwen2.5-VL-7B."""
    return [replace(shape, grid=grid) for shape in (_LLAVA, _QWEN) for grid in (24, 36)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One method at one shape. Seconds are medians over the rounds; prefill_seconds is the layer's
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


def _image(shape: Shape, dtype: torch.dtype) -> VisualTokens:
    """Features with the structure real ones have: a smooth map plus noise."""
    generator = torch.Generator().manual_seed(0)

    def smooth(width: int) -> Tensor:
        coarse = torch.randn(1, width, 6, 6, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (shape.grid, shape.grid), mode="bilinear")
        noise = torch.randn(shape.visual_tokens, width, generator=generator)
        return (fine[0].flatten(1).T + 0.3 * noise).to(dtype)

    cells = torch.arange(shape.grid)
    return VisualTokens(
        features_ND=smooth(shape.hidden),
        hidden_NV=smooth(shape.encoder_width),
        coords_N2=torch.cartesian_prod(cells, cells),
        signals={
            ATTENTION: torch.rand(shape.visual_tokens, generator=generator) ** 4,
            KEYS: smooth(64).float(),
        },
        relevance_N=torch.rand(shape.visual_tokens, generator=generator),
    )


def _layer(shape: Shape, dtype: torch.dtype) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
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
    shapes: Sequence[Shape] | None = None,
) -> dict[str, Any]:
    """Every method at every shape; `ratios` holds the share of the dense prefill per case, and
    `pruner_share` the largest one of `sppruner`."""
    rounds = 2 if quick else 7
    about = machine()
    cases: list[Case] = []
    shares: dict[str, dict[str, float]] = {}
    for shape in shapes or published_shapes():
        told.print(f"{shape.model}, {shape.visual_tokens} visual tokens", highlight=False)
        image = _image(shape, dtype)
        kept = Budget(ratio=_RATIO).count(shape.visual_tokens)
        layer = _layer(shape, dtype)
        dense = _prefill(layer, shape.visual_tokens + shape.text_tokens, dtype)
        pruned = _prefill(layer, kept + shape.text_tokens, dtype)
        selectors = {name: _select(name, image, kept) for name in methods}
        times = _in_turns({"dense": dense, "pruned": pruned} | selectors, rounds)
        for name in selectors:
            part = ratio(
                [
                    took / (shape.layers * whole)
                    for took, whole in zip(times[name], times["dense"], strict=True)
                ]
            )
            shares[f"{name} {shape.model} {shape.visual_tokens}"] = part
            cases.append(
                Case(
                    model=shape.model,
                    visual_tokens=shape.visual_tokens,
                    method=name,
                    rounds=rounds,
                    select_seconds=median(times[name]),
                    prefill_seconds=shape.layers * median(times["dense"]),
                    prefill_seconds_pruned=shape.layers * median(times["pruned"]),
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
