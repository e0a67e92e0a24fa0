"""Continuous batching changes no answer: whoever else runs, arrives, leaves or is cancelled, each
request gets what `generate` gives it alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from PIL import Image

from sppruner.engine import BatchEngine, ContinuousEngine, Generation, Request, Result
from sppruner.engine.loading import LoadedModel, load_model
from sppruner.engine.schedule import Limits
from sppruner.errors import MissingSignal, SpecError
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.folders import write_folder

METHODS = [
    ("none", {}),
    ("grid", {"ratio": 0.25}),
    ("sppruner", {"ratio": 0.3}),
    ("sppruner:mode=pre+mid", {"ratio": 0.3}),
    ("fastv:layer=1", {"ratio": 0.4}),
    ("fastv:layer=2", {"ratio": 0.2}),
    ("topk", {"tokens": 1}),
    ("random", {"tokens": 0}),
    ("prunesid", {"ratio": 0.5, "spread": 0.5}),
]


def spec_of(method: str, budget: dict[str, Any], **changes: Any) -> PruneSpec:
    if method == "none":
        return DENSE
    return replace(PruneSpec.parse(method, Budget(**budget)), **changes)


def drawn(rng: random.Random) -> Image.Image:
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    size = rng.randint(20, 60), rng.randint(20, 60), 3
    return Image.fromarray(torch.randint(0, 256, size, generator=generator).byte().numpy())


def requests(engine: BatchEngine, rng: random.Random, count: int) -> list[Request]:
    """Any method the model can run, with any number of images, length and way of choosing."""
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
        chance = {"temperature": 1.3, "top_p": 0.9, "seed": number} if rng.random() < 0.3 else {}
        made.append(
            Request(
                id=str(number),
                prompt="what is it? " * rng.randint(1, 4),
                images=tuple(drawn(rng) for _ in range(rng.choice([0, 1, 1, 1, 2]))),
                spec=rng.choice(specs),
                generation=Generation(max_new_tokens=rng.randint(1, 8), **chance),
                priority=rng.randint(0, 1),
            )
        )
    return made


def facts(result: Result) -> Result:
    return replace(result, seconds=0.0, control_seconds=None)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_folder(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel) -> BatchEngine:
    return BatchEngine(loaded, max_batch_rows=1)


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(loaded, max_batch_rows=4, limits=Limits(tokens=300))
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_get_the_answers_they_would_get_alone(
    engine: ContinuousEngine, alone: BatchEngine, seed: int
) -> None:
    rng = random.Random(seed)
    waiting = requests(alone, rng, 14)
    expected = [facts(result) for result in alone.run(waiting)]
    assert not [result.error_message for result in expected if result.error_code]
    tickets: dict[int, int] = {}
    answered: dict[int, Result] = {}
    numbers = iter(range(len(waiting)))
    left = True
    while left or len(tickets) < len(waiting):
        for number in islice(numbers, rng.randint(0, 3)):
            tickets[engine.submit(waiting[number])] = number
        left = engine.step()
        answered |= {tickets[u.ticket]: u.result for u in engine.poll() if u.result is not None}
    assert [facts(answered[number]) for number in range(len(waiting))] == expected


@pytest.mark.parametrize("seed", range(2))
def test_cancelled_requests_leave_no_trace_in_the_others_or_in_the_slots(
    engine: ContinuousEngine, alone: BatchEngine, seed: int
) -> None:
    rng = random.Random(100 + seed)
    asked = requests(alone, rng, 12)
    expected = [facts(result) for result in alone.run(asked)]
    tickets = [engine.submit(request) for request in asked]
    victims = rng.sample(range(len(asked)), 5)
    answered: dict[int, Result] = {}
    gone: set[int] = set()
    while engine.step():
        if victims and rng.random() < 0.5 and engine.cancel(tickets[victims[-1]]):
            gone.add(tickets[victims.pop()])
        answered |= {u.ticket: u.result for u in engine.poll() if u.result is not None}
    answered |= {u.ticket: u.result for u in engine.poll() if u.result is not None}
    assert gone
    assert not gone & answered.keys()
    for ticket, result in zip(tickets, expected, strict=True):
        assert ticket in gone or facts(answered[ticket]) == result
    assert engine.in_flight == 0
    cache = engine._rows.cache
    assert [cache.lengths(slot) for slot in range(cache.slots)] == [[0] * len(cache.keys)] * 4
