"""Online requests as users send them: `/v1/chat/completions` under closed-loop load.

On one fleet, so many clients each send their next request once the last was answered: densely and
with 22.2 % of the visual tokens in turns, while nothing else runs and while a batch job keeps the
same replicas busy. Rounds go through all cases, every other one backwards. Every request streams,
and is about an image that was not sent before: none is served from what the replicas remember. The
clients, the proxy and the job share the machine's CPUs with the replicas. Columns of a case:

- requests: of one round.
- requests_per_second: answered ones.
- latency: from sending a request to the end of its answer.
- ttft: to its first words.
- batch_rows_per_second: what the job got meanwhile, by the replicas' counters.
- errors: requests without an answer, of all rounds; they are in no other column.

Percentiles are taken in every round; shown are their medians over the rounds with the smallest and
the largest.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from cluster.demo import Row, draw_rows
from cluster.errors import RunError, UsageError
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import Fleet, open_fleet
from jobs.suites.background import BatchJob
from jobs.suites.corpora import captioned, write_corpus
from jobs.suites.labelling import SPEC, threads_of_one_replica
from jobs.suites.result import in_turn, known_ratio, machine, ratio
from sppruner.models.loading import resolve_model
from sppruner.spec import DENSE
from sppruner.tiny.questions import CAPTION_PROMPT

if TYPE_CHECKING:
    from jobs.suites.load import Load

_UNDER_BATCH: Final = (1, 4)
_UNIT_ROWS: Final = 256  # as jobs cut corpora
_MOST_TOKENS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """requests: of one case in one round, by the number of clients. batch_rows: of the job, which
    must outlast the requests beside it."""

    rounds: int
    requests: Mapping[int, int]
    batch_rows: int


FULL: Final = Extent(rounds=5, requests={1: 40, 4: 80, 16: 160}, batch_rows=8192)
QUICK: Final = Extent(rounds=2, requests={1: 6, 4: 12, 16: 32}, batch_rows=2048)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How requests are sent."""

    pruned: bool
    clients: int
    under_batch: bool = False

    @property
    def name(self) -> str:
        tokens = f"{100 * (SPEC.budget.ratio or 0):.1f} %" if self.pruned else "dense"
        clients = f"{self.clients} client{'s' if self.clients > 1 else ''}"
        return f"{tokens}, {clients}, {'batch job' if self.under_batch else 'idle'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One way in one round. batch_rows_per_second: None where there was no job."""

    load: Load
    batch_rows_per_second: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way over the rounds. See the module for what each column covers."""

    case: str
    requests: int
    requests_per_second: dict[str, float]
    latency_p50_ms: dict[str, float]
    latency_p95_ms: dict[str, float]
    ttft_p50_ms: dict[str, float]
    ttft_p95_ms: dict[str, float]
    batch_rows_per_second: dict[str, float] | None
    errors: int


def online(
    model: str,
    *,
    extent: Extent | None = None,
    quick: bool,
    root: str,
    environment: Mapping[str, str] | None = None,
    told: Console,
) -> dict[str, Any]:
    """root: where the batch job's corpora and labels go. environment: with which Ray's workers
    reach it. Raises UsageError without httpx, and as `BatchJob.check` does."""
    if importlib.util.find_spec("httpx") is None:
        raise UsageError("--suite online needs httpx: pip install 'sppruner[benchmark]'")
    about = machine() | {"torch_threads": threads_of_one_replica()}
    extent = extent or (QUICK if quick else FULL)
    served = EngineSettings(model=model, revision=resolve_model(model).revision)
    with open_fleet(FleetSettings(engine=served, environment=environment or {})) as fleet:
        timed = in_turns(fleet, extent, root=root, told=told)
    return {
        "suite": "online",
        "machine": about | {"model": model, "replicas": fleet.replicas, "rounds": extent.rounds},
        "cases": [asdict(_case(way, timed[way])) for way in ways(extent)],
        "ratios": ratios(timed),
    }


def ways(extent: Extent) -> list[Way]:
    return [
        Way(pruned=pruned, clients=clients, under_batch=under_batch)
        for under_batch in (False, True)
        for clients in (_UNDER_BATCH if under_batch else extent.requests)
        for pruned in (False, True)
    ]


def in_turns(fleet: Fleet, extent: Extent, *, root: str, told: Console) -> dict[Way, list[Timed]]:
    """What was timed of each way, by round. Raises as `_timed` and `BatchJob` do."""
    rows = draw_rows("caption", seed=0)
    timed: dict[Way, list[Timed]] = {way: [] for way in ways(extent)}
    warm = max(extent.requests)
    for pruned in (False, True):
        _timed(fleet, Way(pruned=pruned, clients=warm), extent, rows)
    for number in range(extent.rounds):
        for under_batch in in_turn((False, True), number):
            told.print(
                f"round {number + 1} of {extent.rounds}, "
                f"{'under a batch job' if under_batch else 'idle'}",
                highlight=False,
            )
            with ExitStack() as stack:
                job = None
                if under_batch:
                    corpus, output = f"{root}/corpus-{number}", f"{root}/labels-{number}"
                    write_corpus(corpus, captioned(extent.batch_rows, number + 1), _UNIT_ROWS)
                    units = -(-extent.batch_rows // _UNIT_ROWS)
                    job = stack.enter_context(BatchJob(fleet, corpus, output, units=units))
                for way in in_turn([w for w in timed if w.under_batch == under_batch], number):
                    timed[way].append(_timed(fleet, way, extent, rows))
                    if job is not None:
                        job.check()
    return timed


def _timed(fleet: Fleet, way: Way, extent: Extent, rows: Iterator[Row]) -> Timed:
    """rows: to ask about. Raises RunError where no request was answered."""
    from jobs.suites.load import chat_body, closed_loop

    bodies = [
        chat_body(
            fleet.model,
            CAPTION_PROMPT,
            row.image or b"",
            spec=SPEC if way.pruned else DENSE,
            max_tokens=_MOST_TOKENS,
        )
        for row in islice(rows, extent.requests[way.clients])
    ]
    before, began = fleet.stats().rows, time.perf_counter()
    load = closed_loop(fleet.http_url, bodies, way.clients)
    seconds, after = time.perf_counter() - began, fleet.stats().rows
    if not load.answered:
        raise RunError(f"{way.name}: no request was answered; the first: {load.errors[0]}")
    batch_rows = after - before - len(load.answered)
    return Timed(load=load, batch_rows_per_second=batch_rows / seconds if way.under_batch else None)


def ratios(timed: Mapping[Way, Sequence[Timed]]) -> dict[str, dict[str, float]]:
    """Of the same round each."""

    def paired(figure: Callable[[Load], float], above: Way, below: Way) -> dict[str, float]:
        pairs = zip(timed[above], timed[below], strict=True)
        return ratio([figure(one.load) / figure(other.load) for one, other in pairs])

    most, some = max(way.clients for way in timed), max(_UNDER_BATCH)
    return {
        "online_pruned_vs_dense": paired(
            lambda load: load.requests_per_second,
            Way(pruned=True, clients=most),
            Way(pruned=False, clients=most),
        ),
        # Pruned requests, as the job's rows are.
        "online_p95_under_batch_vs_idle": paired(
            lambda load: load.latency_ms(95),
            Way(pruned=True, clients=some, under_batch=True),
            Way(pruned=True, clients=some),
        ),
    }


def _case(way: Way, timed: Sequence[Timed]) -> Case:
    loads = [one.load for one in timed]
    return Case(
        case=way.name,
        requests=len(loads[0].answered) + len(loads[0].errors),
        requests_per_second=ratio([load.requests_per_second for load in loads]),
        latency_p50_ms=ratio([load.latency_ms(50) for load in loads]),
        latency_p95_ms=ratio([load.latency_ms(95) for load in loads]),
        ttft_p50_ms=ratio([load.first_words_ms(50) for load in loads]),
        ttft_p95_ms=ratio([load.first_words_ms(95) for load in loads]),
        batch_rows_per_second=known_ratio([one.batch_rows_per_second for one in timed]),
        errors=sum(len(load.errors) for load in loads),
    )
