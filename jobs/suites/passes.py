"""Timed passes of suite `engine`: several engine modes answer the same requests in turn."""

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

from jobs.suites.phases import PhaseTimes, time_phases
from jobs.suites.result import alternate
from sppruner import DENSE, PruneSpec
from sppruner.engine import BatchEngine, ContinuousEngine, Request, Result
from sppruner.errors import EngineError
from sppruner.models.loading import LoadedModel
from sppruner.types import PruneReport

_Engine: TypeAlias = BatchEngine | ContinuousEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMode:
    """How requests are answered."""

    name: str
    """The case's name in the result."""
    rows: int
    """Requests side by side: slots of the continuous engine, or the static batch size."""
    continuous: bool = False
    """Continuous batching; False: static batches through `generate`."""
    spec: PruneSpec = DENSE
    """Pruning spec of every request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTiming:
    """One mode in one round."""

    images_per_second: float
    """Throughput over all requests."""
    first_token: float
    """Seconds to the first token of a single request, with nothing else in the engine."""
    inter_token: float
    """Mean seconds between tokens of that request."""


def find_best_batch(loaded: LoadedModel, requests: Sequence[Request]) -> int:
    """The fastest of a few batch sizes above 1 for `generate`, by the better of two passes."""
    sizes = sorted({len(requests) // part for part in (4, 2, 1)} - {0, 1})
    seconds = {}
    for rows in sizes if len(sizes) > 1 else ():
        mode = EngineMode(name=f"generate batch {rows}", rows=rows)
        with closing(_open_engine(loaded, mode)) as engine:
            seconds[rows] = min(_run_requests(engine, mode, requests) for _ in range(2))
    return min(seconds, key=seconds.__getitem__, default=len(requests))


def time_rounds(
    loaded: LoadedModel,
    modes: Sequence[EngineMode],
    requests: Sequence[Request],
    single: Request,
    *,
    rounds: int,
    warmup_rounds: int,
    console: Console,
    others: Mapping[str, Callable[[], EngineTiming]] | None = None,
) -> list[dict[str, EngineTiming]]:
    """Timings by mode name, one mapping per round. One continuous engine serves all budgets.

    single: the request that is timed with nothing else in the engine. others: further participants
    of every round, by name. Raises EngineError as `_run_requests` does, and what `others` raise.
    """
    timings = []
    with ExitStack() as stack:
        engines: dict[tuple[bool, int], _Engine] = {}
        for mode in modes:
            if (mode.continuous, mode.rows) not in engines:
                engine = stack.enter_context(closing(_open_engine(loaded, mode)))
                engines[mode.continuous, mode.rows] = engine
        turns: dict[str, Callable[[], EngineTiming]] = {
            mode.name: partial(
                _time_mode, loaded, engines[mode.continuous, mode.rows], mode, requests, single
            )
            for mode in modes
        } | dict(others or {})
        for number in range(-warmup_rounds, rounds):
            console.print(f"round {number + 1} of {rounds}", highlight=False)
            order = alternate(list(turns), number)
            timing_of = {name: turns[name]() for name in order}
            if number >= 0:
                timings.append(timing_of)
    return timings


def generate_tokens(
    loaded: LoadedModel, mode: EngineMode, requests: Sequence[Request]
) -> list[list[int]]:
    """Generated token ids of each request in a continuous mode; results hold only the text."""
    with closing(_TokenRecorder(loaded, slots=mode.rows, cache_bytes=0)) as engine:
        _run_requests(engine, mode, requests)
    return [engine.tokens[request.id] for request in requests]


def time_pass_phases(
    loaded: LoadedModel, mode: EngineMode, requests: Sequence[Request]
) -> tuple[PhaseTimes, float | None]:
    """One pass with phase timers in a new engine: its phase times, and the peak memory allocated on
    the GPU in MiB (None on a CPU)."""
    gpu = loaded.model.device.type == "cuda"
    with closing(_open_engine(loaded, mode)) as engine:
        if gpu:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        with time_phases(loaded.model) as times:
            _run_requests(engine, mode, requests)
    return times, torch.cuda.max_memory_allocated() / 2**20 if gpu else None


class _TokenRecorder(ContinuousEngine):
    """Records generated token ids by request id."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.tokens: dict[str, list[int]] = {}

    def _result(
        self, request: Request, report: PruneReport, tokens: Sequence[int], *args: Any, **rest: Any
    ) -> Result:
        self.tokens[request.id] = list(tokens)
        return super()._result(request, report, tokens, *args, **rest)


def _open_engine(loaded: LoadedModel, mode: EngineMode) -> _Engine:
    if mode.continuous:
        # The same images recur in every round: without an encoder cache each is encoded every time.
        return ContinuousEngine(loaded, slots=mode.rows, cache_bytes=0)
    return BatchEngine(loaded, slots=mode.rows)


def _time_mode(
    loaded: LoadedModel,
    engine: _Engine,
    mode: EngineMode,
    requests: Sequence[Request],
    single: Request,
) -> EngineTiming:
    with time_phases(loaded.model, wait=False) as times:
        _run_requests(engine, mode, [single])
    assert times.first_token is not None
    rest = times.total - times.first_token
    return EngineTiming(
        first_token=times.first_token,
        inter_token=rest / (single.generation.max_new_tokens - 1),
        images_per_second=len(requests) / _run_requests(engine, mode, requests),
    )


def _run_requests(engine: _Engine, mode: EngineMode, requests: Sequence[Request]) -> float:
    """Seconds until every request is answered. Raises EngineError if an answer failed or is shorter
    than its request's `max_new_tokens`: its time is no measurement."""
    prepared = [replace(request, spec=mode.spec) for request in requests]
    started = time.perf_counter()
    results = engine.run(prepared)
    seconds = time.perf_counter() - started
    for request, result in zip(prepared, results, strict=True):
        if result.error_code is not None:
            raise EngineError(f"{mode.name}, request {request.id}: {result.error_message}")
        if result.completion_tokens != request.generation.max_new_tokens:
            raise EngineError(
                f"{mode.name}, request {request.id}: {result.completion_tokens} tokens generated "
                f"instead of {request.generation.max_new_tokens}: use a model that cannot end early"
            )
    return seconds
