"""Joining the batch: groups wait for requests of their priority and for memory, never for less
urgent ones."""

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
def reference(loaded: LoadedModel) -> BatchEngine:
    return BatchEngine(loaded, slots=1)


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(loaded, slots=8)
    yield made
    made.close()


def results(engine: ContinuousEngine) -> list[tuple[int, Result]]:
    """Results of all submitted requests, in the order in which they ended."""
    ended = []
    left = True
    while left:
        left = engine.step()
        ended += [(u.ticket, u.result) for u in engine.poll() if u.result is not None]
    return ended


def pictured(reference: BatchEngine, seed: int, count: int) -> list[Request]:
    pool = requests(reference, random.Random(seed), 8 * count)
    return [r for r in pool if len(r.images) == 1][:count]


def test_requests_wait_for_memory_and_none_is_lost(
    loaded: LoadedModel, reference: BatchEngine
) -> None:
    """Memory for about two of the longest: the others wait, and get the same answers."""
    batch = requests(reference, random.Random(4), 12)
    expected = [facts(result) for result in reference.run(batch)]
    plenty = ContinuousEngine(loaded, slots=8)
    assert [facts(result) for result in plenty.run(batch)] == expected
    longest = max(result.prompt_tokens for result in expected) + 8
    cache = plenty._running.cache
    per_token = len(cache.keys) * cache._token_bytes
    bound = 2 * (longest + 64) * per_token
    tight = ContinuousEngine(loaded, slots=8, kv_bytes=bound)
    assert [facts(result) for result in tight.run(batch)] == expected
    assert tight._running.cache.nbytes <= bound < plenty._running.cache.nbytes
    assert (plenty.kv_token_capacity, tight.kv_token_capacity) == (None, 2 * (longest + 64))
    hopeless = ContinuousEngine(loaded, slots=8, kv_bytes=64 * per_token)
    refused = [result for result in hopeless.run(batch) if result.error_code]
    assert {result.error_code for result in refused} == {"prompt_invalid"}
    assert all("kv_bytes" in str(result.error_message) for result in refused)
    for engine in (plenty, tight, hopeless):
        engine.close()


def test_a_group_that_runs_out_of_memory_is_prefilled_in_parts_and_answered_once(
    engine: ContinuousEngine, reference: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [replace(request, priority=0) for request in pictured(reference, 6, 6)]
    expected = [facts(result) for result in reference.run(batch)]
    reserve = engine._running.cache.reserve

    def tight(count: int, lengths: Sequence[int]) -> None:
        if count > 3:
            raise torch.OutOfMemoryError("no memory")
        reserve(count, lengths)

    monkeypatch.setattr(engine._running.cache, "reserve", tight)
    tickets = [engine.submit(request) for request in batch]
    ended = results(engine)
    assert sorted(ticket for ticket, _ in ended) == tickets, "each ended once"
    good = {ticket: facts(result) for ticket, result in ended if result.error_code is None}
    assert len(good) == 3, "as many as there was memory for"
    assert all(result == expected[tickets.index(ticket)] for ticket, result in good.items())
    monkeypatch.undo()
    assert [facts(result) for result in engine.run(batch)] == expected


def test_an_online_request_is_prefilled_while_batch_requests_are_prepared(
    engine: ContinuousEngine, reference: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, may_continue = engine._preparer.prepare, threading.Event()
    submitted = [replace(r, priority=min(i, 1)) for i, r in enumerate(pictured(reference, 8, 6))]

    def slowly(request: Request, ticket: int) -> Future[PreparedRequest]:
        preparing, delayed = prepare(request, ticket), Future[PreparedRequest]()
        if request.priority == 0:
            preparing.result()  # prepared already; none of the others is
            return preparing

        def finish() -> None:
            may_continue.wait(10)
            delayed.set_result(preparing.result())

        threading.Thread(target=finish).start()
        return delayed

    monkeypatch.setattr(engine._preparer, "prepare", slowly)
    online, *batch = submitted
    tickets = [engine.submit(request) for request in (*batch, online)]
    engine.step()
    running = {running.prepared.ticket for running in engine._running.requests}
    may_continue.set()
    assert tickets[-1] in running
    assert sorted(ticket for ticket, _ in results(engine)) == tickets
