"""Batches of requests that may run together, the most urgent and oldest first, and a boundary
around each request."""

from __future__ import annotations

import pytest
import torch

from sppruner.engine.interface import Request, Result, SamplingParams
from sppruner.engine.queued import QueuedEngine


class Echo(QueuedEngine):
    """Answers with the prompt; notes its batches. "raise" raises, "fault" is the device's end."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__(rows)
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


def asked(name: str, prompt: str = "hello", **more: object) -> Request:
    return Request(id=name, prompt=prompt, **more)  # type: ignore[arg-type]


def answers(engine: Echo, *requests: Request) -> list[Result]:
    tickets = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    results = {update.ticket: update.result for update in engine.poll()}
    assert not engine.in_flight
    return [results[ticket] for ticket in tickets if results[ticket] is not None]  # type: ignore[misc]


def test_urgent_requests_overtake_and_kinds_never_share_a_batch() -> None:
    engine = Echo()
    long = SamplingParams(max_new_tokens=500)
    answers(
        engine,
        asked("a", priority=1),
        asked("b", priority=1, control=True),
        asked("c", priority=1, generation=long),
        asked("d", priority=1),
        asked("now", priority=0),
        asked("e", priority=1, control=True),
    )
    assert engine.batches == [["now"], ["a", "d"], ["b", "e"], ["c"]]


def test_a_request_that_raises_is_found_by_halving() -> None:
    engine = Echo(rows=8)
    results = answers(engine, *(asked(str(n), "raise" if n == 5 else "hello") for n in range(8)))
    assert [r.error_code for r in results] == [None] * 5 + ["inference_failed"] + [None] * 2
    assert results[5].error_message == "RuntimeError: the model raised"


def test_results_that_do_not_match_their_requests_are_failures_not_others_answers() -> None:
    results = answers(Echo(), asked("a", "shuffle"), asked("b", "raise"))
    assert [r.error_code for r in results] == [None, "inference_failed"]
    results = answers(Echo(), asked("a", "shuffle"), asked("b"))
    assert [(r.text, r.error_code) for r in results] == [("shuffle", None), ("hello", None)]


def test_a_device_fault_is_nobodys_error() -> None:
    engine = Echo()
    engine.submit(asked("a", "fault"))
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_what_is_cancelled_is_not_run_and_what_has_run_cannot_be_cancelled() -> None:
    engine = Echo()
    first, second = engine.submit(asked("a")), engine.submit(asked("b"))
    assert engine.cancel(first)
    engine.step()
    assert engine.batches == [["b"]]
    assert not engine.cancel(second)
    assert [update.ticket for update in engine.poll()] == [second]


def test_busy_seconds_count_batches_alone() -> None:
    engine = Echo()
    engine.step()
    assert engine.busy_seconds == 0
    answers(engine, asked("a"))
    assert engine.busy_seconds > 0
