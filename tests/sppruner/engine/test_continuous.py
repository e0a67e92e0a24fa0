"""Continuous batching changes no answer: whoever else runs, arrives, leaves or is cancelled, each
request gets what `generate` gives it alone."""

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
def alone(loaded: LoadedModel) -> BatchEngine:
    return BatchEngine(loaded, slots=1)


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(loaded, slots=4, limits=PrefillLimits(tokens=300))
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
    cache = engine._running.cache
    assert [cache.lengths(slot) for slot in range(cache.slots)] == [[0] * len(cache.keys)] * 4


def test_a_compiled_step_is_one_graph_whatever_runs(
    loaded: LoadedModel, alone: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budgets, lengths, numbers of rows and stages change no shape of a step."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiling = torch.compile
    monkeypatch.setattr(
        "sppruner.engine.decode.torch.compile",
        lambda function, **how: compiling(
            function, fullgraph=how["fullgraph"], dynamic=how["dynamic"], backend=graphs
        ),
    )
    asked = requests(alone, random.Random(9), 14)
    engine = ContinuousEngine(loaded, slots=4, capacity=512, compiled=True)
    assert [facts(a) for a in engine.run(asked)] == [facts(a) for a in alone.run(asked)]
    assert graphs.frame_count == 1
    engine.close()


def test_slots_that_have_grown_while_answering_take_the_next_request(
    loaded: LoadedModel, alone: BatchEngine
) -> None:
    engine = ContinuousEngine(loaded, slots=2)
    long = SamplingParams(max_new_tokens=80)
    asked = [Request(id=str(n), prompt="a" * 40, generation=long) for n in range(3)]
    expected = [facts(result) for result in alone.run(asked)]
    assert expected[0].completion_tokens > 64, "places of a slot that has not grown"
    for request, result in zip(asked, expected, strict=True):
        assert facts(engine.run([request])[0]) == result
    engine.close()
