"""Random requests: any method, number of images, length and sampling settings."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sppruner.engine import Request, Result, SamplingParams
from sppruner.engine.base import ModelEngine
from sppruner.errors import MissingSignal, SpecError
from sppruner.models.loading import LoadedModel, load_model
from sppruner.spec import DENSE, Budget, PruneSpec
from sppruner.tiny.model import build_model, build_processor, save

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("grid", {"ratio": 0.25}),
    ("sppruner", {"ratio": 0.3}),
    ("sppruner:mode=pre+mid", {"ratio": 0.3}),
    ("fastv:layer=1", {"ratio": 0.4}),
    ("fastv:layer=2", {"ratio": 0.2}),
    ("pyramiddrop", {"ratio": 0.3}),
    ("pyramiddrop:layers=2", {"ratio": 0.3}),
    ("topk", {"tokens": 1}),
    ("random", {"tokens": 0}),
    ("prunesid", {"ratio": 0.5, "spread": 0.5}),
]


def scaled_model(folder: Path) -> LoadedModel:
    """A tiny model of random weights, scaled up: answers depend on the image, and hardly any ends
    by itself."""
    processor = build_processor()
    model = build_model(processor.tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    save(model, processor, folder)
    return load_model(str(folder))


def spec_of(method: str, budget: dict[str, Any], **changes: Any) -> PruneSpec:
    if method == "none":
        return DENSE
    return replace(PruneSpec.parse(method, Budget(**budget)), **changes)


def drawn(rng: random.Random) -> Image.Image:
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    size = rng.randint(20, 60), rng.randint(20, 60), 3
    return Image.fromarray(torch.randint(0, 256, size, generator=generator).byte().numpy())


def requests(engine: ModelEngine, rng: random.Random, count: int) -> list[Request]:
    """Random requests under any spec that the model can run."""
    specs = []
    for method, budget in METHODS:
        for positions in ("keep", "renumber"):
            spec = spec_of(method, budget, positions=positions)
            try:
                engine.check(spec)
            except (SpecError, MissingSignal):
                continue
            specs.append(spec)
    made = []
    for number in range(count):
        sampled: dict[str, Any] = {}
        if rng.random() < 0.3:
            sampled = {"temperature": 1.3, "top_p": 0.9, "seed": number}
        made.append(
            Request(
                id=str(number),
                prompt="what is it? " * rng.randint(1, 4),
                images=tuple(drawn(rng) for _ in range(rng.choice([0, 1, 1, 1, 2]))),
                spec=rng.choice(specs),
                generation=SamplingParams(max_new_tokens=rng.randint(1, 8), **sampled),
                priority=rng.randint(0, 1),
            )
        )
    return made


def facts(result: Result) -> Result:
    """The result without its seconds and what caches spared it."""
    cost = None if result.cost is None else replace(result.cost, flops_cached={})
    return replace(result, seconds=0.0, cost=cost)
