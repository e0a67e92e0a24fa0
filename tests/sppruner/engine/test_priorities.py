"""Urgent requests run alone while others are paused, and a failing step fails its culprit alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from sppruner.engine import BatchEngine, ContinuousEngine, Request, Result, SamplingParams
from sppruner.engine.decode_pace import DecodePace
from sppruner.engine.running_batch import RunningRequest
from sppruner.models.loading import LoadedModel
from tests.sppruner.engine.requests import facts, requests, scaled_model

ONLINE, BATCH = 0, 1


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Random weights, scaled up: answers depend on the image, and hardly any ends by itself."""
    return scaled_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(loaded: LoadedModel) -> BatchEngine:
    return BatchEngine(loaded, slots=1)


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(loaded, slots=4)
    yield made
    made.close()


def long(reference: BatchEngine, priority: int, count: int, tokens: int = 40) -> list[Request]:
    """Requests that are answered with as many tokens as they may have."""
    pool = requests(reference, random.Random(priority), 8 * count)
    asked = [r for r in pool if len(r.images) == 1 and r.generation.temperature == 0][:count]
    generation = SamplingParams(max_new_tokens=tokens)
    return [
        replace(r, id=f"{priority}-{n}", priority=priority, generation=generation)
        for n, r in enumerate(asked)
    ]


def steps(engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The priorities that took part in each decode step from now on."""
    seen: list[list[int]] = []
    step = engine._running.step

    def recording(part: Sequence[RunningRequest]) -> list[RunningRequest]:
        seen.append([running.prepared.priority for running in part])
        return step(part)

    monkeypatch.setattr(engine._running, "step", recording)
    return seen


def finish(engine: ContinuousEngine) -> dict[int, Result]:
    ended: dict[int, Result] = {}
    left = True
    while left:
        left = engine.step()
        ended |= {u.ticket: u.result for u in engine.poll() if u.result is not None}
    return ended


def test_urgent_requests_decode_alone_but_for_the_share_of_others(
    engine: ContinuousEngine, reference: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sppruner.engine.continuous.time", FakeTime())
    monkeypatch.setattr(DecodePace, "rows_beside", lambda *_: 0)  # each row costs
    batch, online = long(reference, BATCH, 3), long(reference, ONLINE, 1)
    expected = [facts(result) for result in reference.run([*batch, *online])]
    lengths = [result.completion_tokens for result in expected]
    assert min(lengths) > 10, "answers of several steps"
    tickets = [engine.submit(request) for request in batch]
    while len(engine._running.requests) < 3:
        engine.step()
    seen = steps(engine, monkeypatch)
    tickets += [engine.submit(request) for request in online]
    ended = finish(engine)
    assert [facts(ended[ticket]) for ticket in tickets] == expected
    contended = [part for part in seen if ONLINE in part]
    alone = [part for part in contended if BATCH not in part]
    assert len(contended) == lengths[-1] - 1
    assert 0.7 <= len(alone) / len(contended) < 0.9, "others have a fifth"


def test_nobody_is_paused_where_a_step_takes_as_long_for_some_as_for_all(
    engine: ContinuousEngine, reference: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sppruner.engine.continuous.time", FakeTime())
    for request in long(reference, BATCH, 3, tokens=60):
        engine.submit(request)
    while len(engine._running.requests) < 3:
        engine.step()
    for _ in range(5):
        engine.step()
    seen = steps(engine, monkeypatch)
    engine.submit(long(reference, ONLINE, 1)[0])
    finish(engine)
    contended = [part for part in seen if ONLINE in part]
    assert sum(part.count(BATCH) for part in contended) > 2 * len(contended)


def test_an_urgent_request_has_a_slot_while_others_hold_all(
    engine: ContinuousEngine, reference: BatchEngine
) -> None:
    for request in long(reference, BATCH, 6):
        engine.submit(request)
    while len(engine._running.requests) < 4:
        engine.step()
    more = [engine.submit(request) for request in long(reference, ONLINE, 3)]
    for _ in range(200):
        engine.step()
        if any(running.prepared.ticket == more[0] for running in engine._running.requests):
            break
    assert len(engine._running.requests) == 5, "the one that is kept for such requests"
    finish(engine)


def test_a_row_that_waits_gets_in_while_somebody_urgent_always_runs(
    engine: ContinuousEngine, reference: BatchEngine
) -> None:
    online = long(reference, ONLINE, 4)
    for request in online:  # they hold all slots, and each that ends is followed by another
        engine.submit(request)
    while len(engine._running.requests) < 4:
        engine.step()
    waiting = engine.submit(long(reference, BATCH, 1, tokens=4)[0])
    for _ in range(2000):
        engine.step()
        ended = [u for u in engine.poll() if u.result is not None]
        if any(u.ticket == waiting for u in ended):
            break
        for _ in ended:
            engine.submit(online[0])
    else:
        pytest.fail("it starves")
    for running in list(engine._running.requests):
        engine.cancel(running.prepared.ticket)
    finish(engine)


def test_two_urgent_requests_at_once_take_the_one_slot_that_is_kept(
    loaded: LoadedModel, reference: BatchEngine
) -> None:
    engine = ContinuousEngine(loaded, slots=8)
    for request in long(reference, BATCH, 8):
        engine.submit(request)
    while len(engine._running.requests) < 8:
        engine.step()
    for request in long(reference, ONLINE, 2):
        engine.submit(request)
    for _ in range(5):
        engine.step()
    assert [ONLINE in engine._running.priorities, len(engine._running.requests)] == [True, 9]
    engine.close()


def test_requests_of_one_priority_never_take_what_is_kept_for_others(
    engine: ContinuousEngine, reference: BatchEngine
) -> None:
    most = 0
    for request in long(reference, ONLINE, 8, tokens=6):
        engine.submit(request)
    while engine.step():
        most = max(most, len(engine._running.requests))
    assert most == 4


@pytest.mark.parametrize("guilty", range(4))
def test_a_step_that_raises_fails_the_request_it_raises_for_alone(
    engine: ContinuousEngine,
    reference: BatchEngine,
    monkeypatch: pytest.MonkeyPatch,
    guilty: int,
) -> None:
    batch = [replace(r, priority=n % 2) for n, r in enumerate(long(reference, BATCH, 4, tokens=8))]
    batch = [replace(r, prompt=r.prompt + " a" * n) for n, r in enumerate(batch)]
    expected = [facts(result) for result in reference.run(batch)]
    tickets = [engine.submit(request) for request in batch]
    decode = engine._running._decode

    def raising(tokens: Any, positions: Any, cache: Any, *rest: Any) -> Any:
        running = engine._running.requests[: len(tokens)]
        if any(one.prepared.ticket == tickets[guilty] and len(one.tokens) == 3 for one in running):
            raise RuntimeError("of one row")
        return decode(tokens, positions, cache, *rest)

    monkeypatch.setattr(engine._running, "_decode", raising)
    ended = finish(engine)
    for number, ticket in enumerate(tickets):
        if number == guilty:
            assert ended[ticket].error_code == "inference_failed"
            assert "of one row" in str(ended[ticket].error_message)
        else:
            assert facts(ended[ticket]) == expected[number]
    cache = engine._running.cache
    assert all(set(cache.lengths(slot)) == {0} for slot in range(cache.slots))


def test_text_that_cannot_be_added_fails_its_own_request(
    engine: ContinuousEngine, reference: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [replace(r, stream=n == 1) for n, r in enumerate(long(reference, BATCH, 3, tokens=6))]
    expected = [facts(result) for result in reference.run(batch)]

    def raising(self: Any, token: int) -> str:
        raise ValueError("no text")

    monkeypatch.setattr("sppruner.engine.detokenizer.Detokenizer.add", raising)
    tickets = [engine.submit(request) for request in batch]
    ended = finish(engine)
    assert ended[tickets[1]].error_code == "inference_failed"
    assert [facts(ended[tickets[n]]) for n in (0, 2)] == [expected[0], expected[2]]


class FakeTime:
    """A clock that every look at it advances by a millisecond."""

    def __init__(self) -> None:
        self._now = 0.0

    def perf_counter(self) -> float:
        self._now += 0.001
        return self._now

    monotonic = perf_counter


def test_slots_are_exchanged_with_all_that_they_hold(engine: ContinuousEngine) -> None:
    cache = engine._running.cache
    layers, heads, width = len(cache.keys), cache.keys[0].shape[1], cache.keys[0].shape[3]
    cache.reserve(2, [8] * layers)
    states = {n: [torch.randn(heads, n, width) for _ in range(layers)] for n in (3, 5)}
    for slot, n in enumerate((3, 5)):
        cache.write(slot, states[n], states[n])
    cache.swap(0, 1)
    for slot, n in enumerate((5, 3)):
        assert cache.lengths(slot) == [n] * layers
        for layer in range(layers):
            assert torch.equal(cache.keys[layer][slot, :, :n], states[n][layer])
            assert torch.equal(cache.values[layer][slot, :, :n], states[n][layer])
    for slot in range(2):
        cache.release(slot)
