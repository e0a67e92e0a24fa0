"""Continuous batching changes no answer: whichever requests run, arrive, leave or are cancelled,
each one gets the answer of `generate` on it alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

from sppruner.engine import BatchEngine, ContinuousEngine, Request, Result, SamplingParams
from sppruner.engine.scheduler import PrefillLimits
from sppruner.models.loading import LoadedModel, load_model
from tests.sppruner.engine.requests import facts, requests
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.folders import write_folder


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_folder(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture(scope="module")
def reference(loaded: LoadedModel) -> BatchEngine:
    return BatchEngine(loaded, slots=1)


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(loaded, slots=4, limits=PrefillLimits(tokens=300))
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_get_the_answers_of_single_requests(
    engine: ContinuousEngine, reference: BatchEngine, seed: int
) -> None:
    rng = random.Random(seed)
    waiting = requests(reference, rng, 14)
    expected = [facts(result) for result in reference.run(waiting)]
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
def test_cancelled_requests_change_neither_other_answers_nor_leave_tokens_in_slots(
    engine: ContinuousEngine, reference: BatchEngine, seed: int
) -> None:
    rng = random.Random(100 + seed)
    batch = requests(reference, rng, 12)
    expected = [facts(result) for result in reference.run(batch)]
    tickets = [engine.submit(request) for request in batch]
    victims = rng.sample(range(len(batch)), 5)
    answered: dict[int, Result] = {}
    cancelled: set[int] = set()
    while engine.step():
        if victims and rng.random() < 0.5 and engine.cancel(tickets[victims[-1]]):
            cancelled.add(tickets[victims.pop()])
        answered |= {u.ticket: u.result for u in engine.poll() if u.result is not None}
    answered |= {u.ticket: u.result for u in engine.poll() if u.result is not None}
    assert cancelled
    assert not cancelled & answered.keys()
    for ticket, result in zip(tickets, expected, strict=True):
        assert ticket in cancelled or facts(answered[ticket]) == result
    assert engine.in_flight == 0
    cache = engine._running.cache
    assert [cache.lengths(slot) for slot in range(cache.slots)] == [
        [0] * len(cache.keys)
    ] * cache.slots


def test_a_compiled_step_is_one_graph_for_every_batch(
    loaded: LoadedModel, reference: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budgets, lengths, numbers of requests and stages change no shape of a step."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiling = torch.compile
    monkeypatch.setattr(
        "sppruner.engine.decode.torch.compile",
        lambda function, **options: compiling(
            function, fullgraph=options["fullgraph"], dynamic=options["dynamic"], backend=graphs
        ),
    )
    batch = requests(reference, random.Random(9), 14)
    engine = ContinuousEngine(loaded, slots=4, capacity=512, compiled=True)
    assert [facts(a) for a in engine.run(batch)] == [facts(a) for a in reference.run(batch)]
    assert graphs.frame_count == 1
    engine.close()


def test_slots_that_have_grown_serve_the_next_request(
    loaded: LoadedModel, reference: BatchEngine
) -> None:
    engine = ContinuousEngine(loaded, slots=2)
    long = SamplingParams(max_new_tokens=80)
    batch = [Request(id=str(n), prompt="a" * 40, generation=long) for n in range(3)]
    expected = [facts(result) for result in reference.run(batch)]
    assert expected[0].completion_tokens > 64, "tokens of a slot that has not grown"
    for request, result in zip(batch, expected, strict=True):
        assert facts(engine.run([request])[0]) == result
    engine.close()
