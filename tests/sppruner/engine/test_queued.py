"""Batches hold requests of one kind, the most urgent and oldest first; an error stays with its
request."""

from __future__ import annotations

import pytest
import torch

from sppruner.engine.interface import Request, Result, SamplingParams
from sppruner.engine.queued import QueuedEngine


class Echo(QueuedEngine):
    """Answers with the prompt; records its batches. "raise" raises, "fault" is a device fault."""

    def __init__(self, slots: int = 4) -> None:
        super().__init__(slots)
        self.batches: list[list[str]] = []

    def answer_batch(self, requests: list[Request]) -> list[Result]:
        self.batches.append([request.id for request in requests])
        prompts = [request.prompt for request in requests]
        if "fault" in prompts:
            raise torch.AcceleratorError("the device is gone")
        if "raise" in prompts:
            raise RuntimeError("the model raised")
        results = [Result(id=request.id, text=request.prompt) for request in requests]
        return results[::-1] if "shuffle" in prompts else results


def request(name: str, prompt: str = "hello", **more: object) -> Request:
    return Request(id=name, prompt=prompt, **more)  # type: ignore[arg-type]


def answers(engine: Echo, *requests: Request) -> list[Result]:
    tickets = [engine.submit(one) for one in requests]
    while engine.step():
        pass
    results = {update.ticket: update.result for update in engine.poll()}
    assert not engine.in_flight
    return [results[ticket] for ticket in tickets if results[ticket] is not None]  # type: ignore[misc]


def test_urgent_requests_go_first_and_kinds_never_share_a_batch() -> None:
    engine = Echo()
    long = SamplingParams(max_new_tokens=500)
    answers(
        engine,
        request("a", priority=1),
        request("c", priority=1, generation=long),
        request("d", priority=1),
        request("urgent", priority=0),
    )
    assert engine.batches == [["urgent"], ["a", "d"], ["c"]]


def test_a_request_that_raises_is_found_by_halving() -> None:
    engine = Echo(slots=8)
    results = answers(engine, *(request(str(n), "raise" if n == 5 else "hello") for n in range(8)))
    assert [r.error_code for r in results] == [None] * 5 + ["inference_failed"] + [None] * 2
    assert results[5].error_message == "RuntimeError: the model raised"


def test_results_that_do_not_match_their_requests_are_errors() -> None:
    results = answers(Echo(), request("a", "shuffle"), request("b", "raise"))
    assert [r.error_code for r in results] == [None, "inference_failed"]
    results = answers(Echo(), request("a", "shuffle"), request("b"))
    assert [(r.text, r.error_code) for r in results] == [("shuffle", None), ("hello", None)]


def test_a_device_fault_is_no_requests_error() -> None:
    engine = Echo()
    engine.submit(request("a", "fault"))
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_a_cancelled_request_does_not_run_and_an_ended_one_cannot_be_cancelled() -> None:
    engine = Echo()
    first, second = engine.submit(request("a")), engine.submit(request("b"))
    assert engine.cancel(first)
    engine.step()
    assert engine.batches == [["b"]]
    assert not engine.cancel(second)
    assert [update.ticket for update in engine.poll()] == [second]


def test_busy_seconds_count_batches_only() -> None:
    engine = Echo()
    engine.step()
    assert engine.busy_seconds == 0
    answers(engine, request("a"))
    assert engine.busy_seconds > 0
