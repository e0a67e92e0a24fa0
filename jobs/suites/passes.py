"""Timed passes of suite `engine`: ways to answer the same requests, in turns and one by one."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from rich.console import Console

from jobs.suites.phases import Trace, traced
from jobs.suites.result import in_turn
from sppruner import DENSE, PruneSpec
from sppruner.engine import BatchEngine, ContinuousEngine, Request, Result
from sppruner.errors import EngineError
from sppruner.models.loading import LoadedModel
from sppruner.types import PruneReport

_Engine: TypeAlias = BatchEngine | ContinuousEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How requests are answered: rows side by side, by the continuous engine or by `generate`."""

    name: str
    rows: int
    continuous: bool = False
    spec: PruneSpec = DENSE


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One way in one round. Seconds of one request alone: to its first token, and from each of its
    tokens to the next."""

    images_per_second: float
    first_token: float
    between_tokens: float


def best_rows(loaded: LoadedModel, requests: Sequence[Request]) -> int:
    """The fastest of a few batch sizes above 1 for `generate`, by the better of two passes."""
    sizes = sorted({len(requests) // part for part in (4, 2, 1)} - {0, 1})
    seconds = {}
    for rows in sizes if len(sizes) > 1 else ():
        way = Way(name=f"generate batch {rows}", rows=rows)
        with closing(_engine(loaded, way)) as answering:
            seconds[rows] = min(_answer(answering, way, requests) for _ in range(2))
    return min(seconds, key=seconds.__getitem__, default=len(requests))


def in_turns(
    loaded: LoadedModel,
    ways: Sequence[Way],
    requests: Sequence[Request],
    alone: Request,
    *,
    rounds: int,
    uncounted: int,
    told: Console,
    others: Mapping[str, Callable[[], Timed]] | None = None,
) -> list[dict[str, Timed]]:
    """What was timed of each way, by round. alone: the request that is also timed by itself. One
    continuous engine serves all budgets. others: what else takes a turn in every round, by name.
    Raises EngineError as `_answer` does, and what `others` raise."""
    timed = []
    with ExitStack() as stack:
        engines: dict[tuple[bool, int], _Engine] = {}
        for way in ways:
            if (way.continuous, way.rows) not in engines:
                opened = stack.enter_context(closing(_engine(loaded, way)))
                engines[way.continuous, way.rows] = opened
        turns: dict[str, Callable[[], Timed]] = {
            way.name: partial(
                _timed, loaded, engines[way.continuous, way.rows], way, requests, alone
            )
            for way in ways
        } | dict(others or {})
        for number in range(-uncounted, rounds):
            told.print(f"round {number + 1} of {rounds}", highlight=False)
            order = in_turn(list(turns), number)
            found = {name: turns[name]() for name in order}
            if number >= 0:
                timed.append(found)
    return timed


def spoken(loaded: LoadedModel, way: Way, requests: Sequence[Request]) -> list[list[int]]:
    """The tokens of each answer, which results do not hold, of a way that is continuous."""
    with closing(_Noting(loaded, slots=way.rows, cache_bytes=0)) as answering:
        _answer(answering, way, requests)
    return [answering.tokens[request.id] for request in requests]


def timed_pass(
    loaded: LoadedModel, way: Way, requests: Sequence[Request]
) -> tuple[Trace, float | None]:
    """One pass with timers, in an engine of its own; and the MiB that were allocated on the GPU at
    most, where there is one."""
    gpu = loaded.model.device.type == "cuda"
    with closing(_engine(loaded, way)) as answering:
        if gpu:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        with traced(loaded.model) as trace:
            _answer(answering, way, requests)
    return trace, torch.cuda.max_memory_allocated() / 2**20 if gpu else None


class _Noting(ContinuousEngine):
    """Keeps the tokens of its answers by request."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.tokens: dict[str, list[int]] = {}

    def _result(
        self, request: Request, report: PruneReport, tokens: Sequence[int], *args: Any, **said: Any
    ) -> Result:
        self.tokens[request.id] = list(tokens)
        return super()._result(request, report, tokens, *args, **said)


def _engine(loaded: LoadedModel, way: Way) -> _Engine:
    if way.continuous:
        # The same images come round again and again: none may be remembered.
        return ContinuousEngine(loaded, slots=way.rows, cache_bytes=0)
    return BatchEngine(loaded, slots=way.rows)


def _timed(
    loaded: LoadedModel, answering: _Engine, way: Way, requests: Sequence[Request], alone: Request
) -> Timed:
    with traced(loaded.model, wait=False) as trace:
        _answer(answering, way, [alone])
    assert trace.first_token is not None
    rest = trace.total - trace.first_token
    return Timed(
        first_token=trace.first_token,
        between_tokens=rest / (alone.generation.max_new_tokens - 1),
        images_per_second=len(requests) / _answer(answering, way, requests),
    )


def _answer(answering: _Engine, way: Way, requests: Sequence[Request]) -> float:
    """Seconds until all are answered. Raises EngineError for an answer that failed or was not as
    long as it should be: its seconds would say nothing."""
    asked = [replace(request, spec=way.spec) for request in requests]
    began = time.perf_counter()
    results = answering.run(asked)
    seconds = time.perf_counter() - began
    for request, result in zip(asked, results, strict=True):
        if result.error_code is not None:
            raise EngineError(f"{way.name}, request {request.id}: {result.error_message}")
        if result.completion_tokens != request.generation.max_new_tokens:
            raise EngineError(
                f"{way.name}, request {request.id}: {result.completion_tokens} tokens were said "
                f"instead of {request.generation.max_new_tokens}: use a model that cannot end early"
            )
    return seconds
