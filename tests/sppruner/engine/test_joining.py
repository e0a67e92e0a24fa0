"""Who joins next: groups wait for their equals and for memory, nobody waits for those behind."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from sppruner.engine import BatchEngine, ContinuousEngine, Request, Result
from sppruner.engine.preparation import PreparedRequest
from sppruner.models.loading import EMBEDDED, LoadedModel, load_model
from tests.sppruner.engine.requests import facts, requests


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(EMBEDDED)


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel) -> BatchEngine:
    return BatchEngine(loaded, slots=1)


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(loaded, slots=8)
    yield made
    made.close()


def results(engine: ContinuousEngine) -> list[tuple[int, Result]]:
    """Of all that were submitted, in the order in which they ended."""
    ended = []
    left = True
    while left:
        left = engine.step()
        ended += [(u.ticket, u.result) for u in engine.poll() if u.result is not None]
    return ended


def pictured(alone: BatchEngine, seed: int, count: int) -> list[Request]:
    asked = requests(alone, random.Random(seed), 8 * count)
    return [r for r in asked if len(r.images) == 1 and not r.control][:count]


def test_requests_wait_for_memory_and_none_is_lost(loaded: LoadedModel, alone: BatchEngine) -> None:
    """Room for about two of the longest: the others wait, and get the same answers."""
    asked = requests(alone, random.Random(4), 12)
    expected = [facts(result) for result in alone.run(asked)]
    plenty = ContinuousEngine(loaded, slots=8)
    assert [facts(result) for result in plenty.run(asked)] == expected
    longest = max(result.prompt_tokens for result in expected) + 8
    cache = plenty._running.cache
    per_token = len(cache.keys) * cache._token_bytes
    bound = 2 * (longest + 64) * per_token
    tight = ContinuousEngine(loaded, slots=8, kv_bytes=bound)
    assert [facts(result) for result in tight.run(asked)] == expected
    assert tight._running.cache.nbytes <= bound < plenty._running.cache.nbytes
    assert (plenty.kv_token_capacity, tight.kv_token_capacity) == (None, 2 * (longest + 64))
    hopeless = ContinuousEngine(loaded, slots=8, kv_bytes=64 * per_token)
    refused = [result for result in hopeless.run(asked) if result.error_code]
    assert {result.error_code for result in refused} == {"prompt_invalid"}
    assert all("kv_bytes" in str(result.error_message) for result in refused)
    for engine in (plenty, tight, hopeless):
        engine.close()


def test_a_group_that_finds_no_memory_is_read_in_parts_and_answered_once(
    engine: ContinuousEngine, alone: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pictured(alone, 6, 6)
    expected = [facts(result) for result in alone.run(asked)]
    prepare = engine._running.cache.reserve

    def tight(rows: int, lengths: Sequence[int]) -> None:
        if rows > 3:
            raise torch.OutOfMemoryError("no room")
        prepare(rows, lengths)

    monkeypatch.setattr(engine._running.cache, "reserve", tight)
    tickets = [engine.submit(request) for request in asked]
    ended = results(engine)
    assert sorted(ticket for ticket, _ in ended) == tickets, "each ended once"
    good = {ticket: facts(result) for ticket, result in ended if result.error_code is None}
    assert len(good) == 3, "as many as there was room for"
    assert all(result == expected[tickets.index(ticket)] for ticket, result in good.items())
    monkeypatch.undo()
    assert [facts(result) for result in engine.run(asked)] == expected


def test_an_online_request_is_read_next_while_batch_rows_are_prepared(
    engine: ContinuousEngine, alone: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, may_go_on = engine._preparer.prepare, threading.Event()
    asked = [replace(r, priority=min(i, 1)) for i, r in enumerate(pictured(alone, 8, 6))]

    def slowly(request: Request, ticket: int) -> Future[PreparedRequest]:
        asking, later = ask(request, ticket), Future[PreparedRequest]()
        if request.priority == 0:
            asking.result()  # is prepared already; of the others nobody is yet
            return asking

        def prepared() -> None:
            may_go_on.wait(10)
            later.set_result(asking.result())

        threading.Thread(target=prepared).start()
        return later

    monkeypatch.setattr(engine._preparer, "prepare", slowly)
    online, *batch = asked
    tickets = [engine.submit(request) for request in (*batch, online)]
    engine.step()
    running = {running.prepared.ticket for running in engine._running.requests}
    may_go_on.set()
    assert tickets[-1] in running
    assert sorted(ticket for ticket, _ in results(engine)) == tickets
