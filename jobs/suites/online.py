"""Suite `online`: `/v1/chat/completions` under closed-loop load.

Several clients send requests to one fleet, each its next request after the response to the last:
dense and with 22.2 % of the visual tokens in turn, on idle replicas and while a batch job keeps the
same replicas busy. Rounds visit all cases, every second round in reverse order. Every request
streams and is about a new image, so the encoder cache serves none of them. Clients, proxy and job
share the machine's CPUs with the replicas. Columns of a case:

- requests: requests of one round.
- requests_per_second: complete responses per second.
- latency: from sending a request to the end of its response.
- ttft: from sending a request to the first text of its response.
- batch_rows_per_second: throughput of the job meanwhile, from the replicas' counters.
- errors: requests without a complete response in all rounds; no other column counts them.

Beside that, the job's rows a second with one request every two seconds over those with none.

Percentiles are taken per round; a case shows their median over the rounds with the smallest and the
largest.
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

from cluster.demo import DrawnRow, draw_rows
from cluster.errors import LoadFailed, UsageError
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import Fleet, open_fleet
from jobs.suites.background import BatchJob
from jobs.suites.corpora import draw_captioned, write_corpus
from jobs.suites.labelling import SPEC, count_replica_threads
from jobs.suites.result import alternate, describe_machine, summarise_known_rounds, summarise_rounds
from sppruner.models.loading import resolve_model
from sppruner.spec import DENSE
from sppruner.tiny.questions import CAPTION_PROMPT

if TYPE_CHECKING:
    from jobs.suites.load import LoadResult

_UNDER_BATCH: Final = (1, 4)
_FILE_ROWS: Final = 256
_MOST_TOKENS: Final = 64
_SETTLING_SECONDS: Final = 11.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteSize:
    """How much the suite runs."""

    rounds: int
    """Rounds over all scenarios."""
    requests: Mapping[int, int]
    """Requests of one scenario in one round, by number of clients."""
    batch_rows: int
    """Rows of the batch job, which must outlast the requests beside it."""
    light_requests: int = 10
    """Requests of the light load beside the job, one at a time."""
    pause: float = 2.0
    """Seconds between them."""


FULL: Final = SuiteSize(rounds=5, requests={1: 40, 4: 80, 16: 160}, batch_rows=8192)
QUICK: Final = SuiteSize(
    rounds=2, requests={1: 6, 4: 12, 16: 32}, batch_rows=4096, light_requests=5
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadScenario:
    """How requests are sent."""

    pruned: bool
    """Whether requests carry the suite's spec; False: dense."""
    clients: int
    """Requests in flight."""
    under_batch: bool = False
    """Whether a batch job runs on the same replicas."""

    @property
    def name(self) -> str:
        tokens = f"{100 * (SPEC.budget.ratio or 0):.1f} %" if self.pruned else "dense"
        clients = f"{self.clients} client{'s' if self.clients > 1 else ''}"
        return f"{tokens}, {clients}, {'batch job' if self.under_batch else 'idle'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioTiming:
    """One scenario in one round."""

    load: LoadResult
    """Responses and errors."""
    batch_rows_per_second: float | None
    """Throughput of the batch job; None without a job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LightRound:
    """What a job does beside hardly any online request, in one round."""

    alone: float
    """Rows a second without any, in as many seconds."""
    beside: float
    """Rows a second beside the light load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineCase:
    """One scenario over all rounds; the module docstring defines the columns."""

    case: str
    requests: int
    requests_per_second: dict[str, float]
    latency_p50_ms: dict[str, float]
    latency_p95_ms: dict[str, float]
    ttft_p50_ms: dict[str, float]
    ttft_p95_ms: dict[str, float]
    batch_rows_per_second: dict[str, float] | None
    errors: int


def run_online_suite(
    model: str,
    *,
    size: SuiteSize | None = None,
    quick: bool,
    root: str,
    environment: Mapping[str, str] | None = None,
    console: Console,
) -> dict[str, Any]:
    """root: URI prefix of the batch job's corpora and labels. environment: variables with which
    Ray's workers reach it. Raises UsageError without httpx, and as `BatchJob.check` does."""
    if importlib.util.find_spec("httpx") is None:
        raise UsageError("--suite online needs httpx: pip install 'sppruner[benchmark]'")
    machine = describe_machine() | {"torch_threads": count_replica_threads()}
    size = size or (QUICK if quick else FULL)
    served = EngineSettings(model=model, revision=resolve_model(model).revision)
    with open_fleet(FleetSettings(engine=served, environment=environment or {})) as fleet:
        timings, light = time_scenarios(fleet, size, root=root, console=console)
    return {
        "suite": "online",
        "machine": machine | {"model": model, "replicas": fleet.replicas, "rounds": size.rounds},
        "cases": [
            asdict(_make_case(scenario, timings[scenario])) for scenario in list_scenarios(size)
        ],
        "ratios": compare_scenarios(timings, light),
    }


def list_scenarios(size: SuiteSize) -> list[LoadScenario]:
    return [
        LoadScenario(pruned=pruned, clients=clients, under_batch=under_batch)
        for under_batch in (False, True)
        for clients in (_UNDER_BATCH if under_batch else size.requests)
        for pruned in (False, True)
    ]


def time_scenarios(
    fleet: Fleet, size: SuiteSize, *, root: str, console: Console
) -> tuple[dict[LoadScenario, list[ScenarioTiming]], list[LightRound]]:
    """Timings of each scenario, one per round, and the job beside a light load. Raises as
    `_time_scenario` and `BatchJob` do."""
    rows = draw_rows("caption", seed=0)
    timings: dict[LoadScenario, list[ScenarioTiming]] = {
        scenario: [] for scenario in list_scenarios(size)
    }
    light: list[LightRound] = []
    warm = max(size.requests)
    for pruned in (False, True):
        _time_scenario(fleet, LoadScenario(pruned=pruned, clients=warm), size, rows)
    for number in range(size.rounds):
        for under_batch in alternate((False, True), number):
            console.print(
                f"round {number + 1} of {size.rounds}, "
                f"{'under a batch job' if under_batch else 'idle'}",
                highlight=False,
            )
            with ExitStack() as stack:
                job = None
                if under_batch:
                    corpus, output = f"{root}/corpus-{number}", f"{root}/labels-{number}"
                    write_corpus(corpus, draw_captioned(size.batch_rows, number + 1), _FILE_ROWS)
                    job = stack.enter_context(BatchJob(fleet, corpus, output))
                for scenario in alternate(
                    [s for s in timings if s.under_batch == under_batch], number
                ):
                    timings[scenario].append(_time_scenario(fleet, scenario, size, rows))
                    if job is not None:
                        job.check()
                if job is not None:
                    light.append(_time_light_load(fleet, size, rows, job))
    return timings, light


def _time_light_load(
    fleet: Fleet, size: SuiteSize, rows: Iterator[DrawnRow], job: BatchJob
) -> LightRound:
    """Raises as `BatchJob.check` does."""
    from jobs.suites.load import run_closed_loop

    bodies = _bodies(fleet, rows, size.light_requests, pruned=True)
    # What an urgent request leaves behind in an engine lasts for seconds: it is over first.
    time.sleep(_SETTLING_SECONDS)
    before, started = fleet.stats().rows, time.perf_counter()
    time.sleep(size.light_requests * size.pause)
    between, middle = fleet.stats().rows, time.perf_counter()
    load = run_closed_loop(fleet.http_url, bodies, 1, pause=size.pause)
    after, ended = fleet.stats().rows, time.perf_counter()
    job.check()  # what it did was its pace all the time
    return LightRound(
        alone=(between - before) / (middle - started),
        beside=(after - between - len(load.answered)) / (ended - middle),
    )


def _bodies(fleet: Fleet, rows: Iterator[DrawnRow], count: int, *, pruned: bool) -> list[bytes]:
    from jobs.suites.load import build_chat_body

    return [
        build_chat_body(
            fleet.model,
            CAPTION_PROMPT,
            row.image or b"",
            spec=SPEC if pruned else DENSE,
            max_tokens=_MOST_TOKENS,
        )
        for row in islice(rows, count)
    ]


def _time_scenario(
    fleet: Fleet, scenario: LoadScenario, size: SuiteSize, rows: Iterator[DrawnRow]
) -> ScenarioTiming:
    """rows: source of the images. Raises LoadFailed if no request got a complete response."""
    from jobs.suites.load import run_closed_loop

    bodies = _bodies(fleet, rows, size.requests[scenario.clients], pruned=scenario.pruned)
    before, started = fleet.stats().rows, time.perf_counter()
    load = run_closed_loop(fleet.http_url, bodies, scenario.clients)
    seconds, after = time.perf_counter() - started, fleet.stats().rows
    if not load.answered:
        raise LoadFailed(
            f"{scenario.name}: no request was answered; the first error: {load.errors[0]}"
        )
    batch_rows = after - before - len(load.answered)
    return ScenarioTiming(
        load=load, batch_rows_per_second=batch_rows / seconds if scenario.under_batch else None
    )


def compare_scenarios(
    timings: Mapping[LoadScenario, Sequence[ScenarioTiming]], light: Sequence[LightRound]
) -> dict[str, dict[str, float]]:
    """Ratios of two scenarios within the same round."""

    def compare_rounds(
        figure: Callable[[LoadResult], float], above: LoadScenario, below: LoadScenario
    ) -> dict[str, float]:
        pairs = zip(timings[above], timings[below], strict=True)
        return summarise_rounds([figure(one.load) / figure(other.load) for one, other in pairs])

    most_clients, some = max(scenario.clients for scenario in timings), max(_UNDER_BATCH)
    return {
        "online_pruned_vs_dense": compare_rounds(
            lambda load: load.requests_per_second,
            LoadScenario(pruned=True, clients=most_clients),
            LoadScenario(pruned=False, clients=most_clients),
        ),
        # Pruned requests beside a pruned job.
        "online_p95_under_batch_vs_idle": compare_rounds(
            lambda load: load.latency_ms(95),
            LoadScenario(pruned=True, clients=some, under_batch=True),
            LoadScenario(pruned=True, clients=some),
        ),
        **{
            f"online_ttft_p95_under_batch_vs_idle_{clients}_clients": compare_rounds(
                lambda load: load.ttft_ms(95),
                LoadScenario(pruned=True, clients=clients, under_batch=True),
                LoadScenario(pruned=True, clients=clients),
            )
            for clients in _UNDER_BATCH
        },
        "batch_beside_light_online_vs_alone": summarise_rounds(
            [one.beside / one.alone for one in light]
        ),
    }


def _make_case(scenario: LoadScenario, timings: Sequence[ScenarioTiming]) -> OnlineCase:
    loads = [one.load for one in timings]
    return OnlineCase(
        case=scenario.name,
        requests=len(loads[0].answered) + len(loads[0].errors),
        requests_per_second=summarise_rounds([load.requests_per_second for load in loads]),
        latency_p50_ms=summarise_rounds([load.latency_ms(50) for load in loads]),
        latency_p95_ms=summarise_rounds([load.latency_ms(95) for load in loads]),
        ttft_p50_ms=summarise_rounds([load.ttft_ms(50) for load in loads]),
        ttft_p95_ms=summarise_rounds([load.ttft_ms(95) for load in loads]),
        batch_rows_per_second=summarise_known_rounds(
            [one.batch_rows_per_second for one in timings]
        ),
        errors=sum(len(load.errors) for load in loads),
    )
