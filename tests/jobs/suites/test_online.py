"""Suite `online`: what its clients count and time, and what its ratios compare."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from rich.console import Console

import jobs.suites.load
from cluster.errors import LoadFailed, RunError, UsageError
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import Fleet, open_fleet
from jobs.suites import online as suite
from jobs.suites.background import BatchJob
from jobs.suites.corpora import draw_captioned, write_corpus
from jobs.suites.load import (
    LoadResult,
    RequestTiming,
    build_chat_body,
    percentile_ms,
    run_closed_loop,
)
from jobs.suites.online import (
    FULL,
    QUICK,
    LightRound,
    LoadScenario,
    ScenarioTiming,
    SuiteSize,
    compare_scenarios,
    list_scenarios,
    run_online_suite,
    time_scenarios,
)
from sppruner import DENSE, Budget, PruneSpec
from sppruner.models.loading import resolve_model
from tests.cluster.fake_engine import picture

QUIET = Console(quiet=True)
SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.25))
SMALL = SuiteSize(
    rounds=2, requests={1: 1, 4: 2, 16: 3}, batch_rows=3, light_requests=1, pause=0.01
)


def load(*latencies: float, seconds: float = 1.0, errors: int = 0) -> LoadResult:
    answered = tuple(RequestTiming(first_token=end / 2, end=end) for end in latencies)
    return LoadResult(seconds=seconds, answered=answered, errors=("no",) * errors)


def test_percentiles_interpolate_between_neighbours() -> None:
    seconds = [0.1 * n for n in range(1, 12)]
    assert percentile_ms(seconds, 50) == pytest.approx(600)
    assert percentile_ms(seconds[::-1], 95) == pytest.approx(1050)
    assert percentile_ms([0.2], 95) == pytest.approx(200)


def test_failed_requests_count_neither_as_speed_nor_as_latency() -> None:
    found = load(0.2, 0.4, seconds=4.0, errors=6)
    assert found.requests_per_second == 0.5
    assert found.latency_ms(50) == pytest.approx(300)
    assert found.ttft_ms(50) == pytest.approx(150)


def test_each_client_has_one_request_in_flight_and_none_is_sent_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_flight = most_in_flight = 0
    sent: list[bytes] = []

    async def ask(http: httpx.AsyncClient, url: str, body: bytes) -> RequestTiming:
        nonlocal in_flight, most_in_flight
        sent.append(body)
        in_flight += 1
        most_in_flight = max(most_in_flight, in_flight)
        await asyncio.sleep(0.001)
        in_flight -= 1
        if body == b"3":
            raise LoadFailed("no")
        return RequestTiming(first_token=0.1, end=0.2)

    monkeypatch.setattr(jobs.suites.load, "_send", ask)
    bodies = [b"%d" % number for number in range(20)]
    found = run_closed_loop("http://nowhere", bodies, 4)
    assert most_in_flight == 4
    assert sorted(sent) == sorted(bodies)
    assert (len(found.answered), found.errors) == (19, ("LoadFailed: no",))


@dataclass
class Clock:
    now: float = 10.0

    def perf_counter(self) -> float:
        return self.now


def send(*chunks: dict[str, Any], status: int = 200, clock: Clock | None = None) -> RequestTiming:
    """The timing of one response whose chunks arrive a second apart."""
    clock = clock or Clock()

    async def pieces() -> AsyncGenerator[bytes]:
        for chunk in chunks:
            clock.now += 1
            yield f"data: {json.dumps(chunk)}\n\n".encode()
        yield b"data: [DONE]\n\n"

    async def ask() -> RequestTiming:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, content=pieces()))
        async with httpx.AsyncClient(transport=transport) as http:
            return await jobs.suites.load._send(http, "http://nowhere", b"{}")

    return asyncio.run(ask())


def chunk(content: str = "", finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": content}, "finish_reason": finish}]}


def test_the_first_token_is_the_first_chunk_with_text(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(jobs.suites.load, "time", clock)
    found = send(chunk(""), chunk("a"), chunk("b"), chunk(finish="stop"), clock=clock)
    assert found == RequestTiming(first_token=2.0, end=4.0)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda: send(chunk("a")), "ended before"),
        (lambda: send(chunk("a"), {"error": {"code": "overloaded"}}), "overloaded"),
        (lambda: send(status=503), "503"),
    ],
)
def test_an_incomplete_response_is_an_error(answer: Callable[[], RequestTiming], why: str) -> None:
    with pytest.raises(LoadFailed, match=why):
        answer()


def test_clients_send_the_budget_of_the_spec_to_a_real_endpoint(fleet: Fleet) -> None:
    bodies = [
        build_chat_body("fake-model", "p", picture(n), spec=(DENSE, SPEC)[n % 2], max_tokens=8)
        for n in range(6)
    ]
    wrong = build_chat_body("other-model", "p", picture(9), spec=DENSE, max_tokens=8)
    kept = [json.loads(body).get("prune") for body in bodies]
    assert kept == [None, {"method": "sppruner", "retain": 0.25}] * 3
    found = run_closed_loop(fleet.http_url, [*bodies, wrong], 3)
    assert len(found.answered) == 6
    assert all(0 < one.first_token <= one.end <= found.seconds for one in found.answered)
    assert ["other-model" in error for error in found.errors] == [True]


@dataclass
class RecordingFleet:
    """A fleet that records the requests it gets. rows: its counter of answered rows."""

    model: str = "m"
    http_url: str = "http://nowhere"
    rows: int = 0

    def __post_init__(self) -> None:
        self.sent: list[tuple[list[bytes], int, bool]] = []
        self.batch = False
        self.fails = False

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(rows=self.rows)

    def run_closed_loop(
        self, base_url: str, bodies: list[bytes], clients: int, *, pause: float = 0.0
    ) -> LoadResult:
        self.sent.append((bodies, clients, self.batch))
        self.rows += len(bodies) + 7 * self.batch
        if self.fails:
            return load(errors=len(bodies))
        return load(*(0.1 for _ in bodies))

    @contextmanager
    def batch_job(self, *_: object) -> Iterator[SimpleNamespace]:
        self.batch = True
        yield SimpleNamespace(check=lambda: None)
        self.batch = False


@pytest.fixture
def recording_fleet(monkeypatch: pytest.MonkeyPatch) -> RecordingFleet:
    fleet = RecordingFleet()
    monkeypatch.setattr(jobs.suites.load, "run_closed_loop", fleet.run_closed_loop)
    monkeypatch.setattr(suite, "BatchJob", fleet.batch_job)
    monkeypatch.setattr(suite, "write_corpus", lambda *_: None)
    monkeypatch.setattr(suite, "_SETTLING_SECONDS", 0.0)
    return fleet


def pruned(body: bytes) -> bool:
    return "prune" in json.loads(body)


def test_rounds_alternate_and_send_every_image_once(recording_fleet: RecordingFleet) -> None:
    timed, light = time_scenarios(cast(Fleet, recording_fleet), SMALL, root="", console=QUIET)
    order = [
        LoadScenario(pruned=pruned(bodies[0]), clients=clients, under_batch=batch)
        for bodies, clients, batch in recording_fleet.sent
    ]
    few = LoadScenario(pruned=True, clients=1, under_batch=True)  # the light load ends its phase
    assert (order.pop(12), order.pop(16)) == (few, few)
    assert len(light) == 2
    warm, first, second = order[:2], order[2:12], order[12:]
    assert [scenario.clients for scenario in warm] == [16, 16]
    assert first == list_scenarios(SMALL)
    assert second == first[::-1]
    bodies = [body for sent, _, _ in recording_fleet.sent for body in sent]
    images = [json.loads(b)["messages"][0]["content"][0]["image_url"]["url"] for b in bodies]
    assert len(set(images)) == len(images) == 2 * 3 + 2 * (2 * (1 + 2 + 3) + 2 * (1 + 2) + 1)
    assert {scenario: len(rounds) for scenario, rounds in timed.items()} == dict.fromkeys(
        list_scenarios(SMALL), 2
    )
    for scenario, rounds in timed.items():
        for one in rounds:
            assert (one.batch_rows_per_second is not None) == scenario.under_batch
            assert len(one.load.answered) == SMALL.requests[scenario.clients]
            if one.batch_rows_per_second is not None:
                assert one.batch_rows_per_second > 0


def test_a_scenario_without_any_response_stops_the_suite(recording_fleet: RecordingFleet) -> None:
    recording_fleet.fails = True
    with pytest.raises(LoadFailed, match="dense, 16 clients, idle: no request was answered"):
        time_scenarios(cast(Fleet, recording_fleet), SMALL, root="", console=QUIET)


@pytest.mark.parametrize("size", [FULL, QUICK])
def test_the_cases_are_the_documented_ones(size: SuiteSize) -> None:
    assert [scenario.name for scenario in list_scenarios(size)] == [
        f"{tokens}, {clients}, {beside}"
        for beside, all_clients in (
            ("idle", ["1 client", "4 clients", "16 clients"]),
            ("batch job", ["1 client", "4 clients"]),
        )
        for clients in all_clients
        for tokens in ("dense", "22.2 %")
    ]


def test_ratios_compare_scenarios_within_the_same_round() -> None:
    timed = {
        scenario: [ScenarioTiming(load=load(9.0, seconds=9.0), batch_rows_per_second=None)] * 3
        for scenario in list_scenarios(SMALL)
    }

    def set_loads(scenario: LoadScenario, *loads: LoadResult) -> None:
        timed[scenario] = [ScenarioTiming(load=one, batch_rows_per_second=None) for one in loads]

    most_in_flight = LoadScenario(pruned=True, clients=16)
    set_loads(most_in_flight, *(load(1.0, 1.0, seconds=s) for s in (1.0, 0.5, 2.0)))
    set_loads(
        replace(most_in_flight, pruned=False), *(load(1.0, seconds=s) for s in (1.0, 1.0, 1.0))
    )
    few_clients = LoadScenario(pruned=True, clients=4)
    set_loads(few_clients, load(0.1), load(0.2), load(0.5))
    set_loads(replace(few_clients, under_batch=True), load(0.3), load(0.4), load(2.0))
    light = [LightRound(alone=10.0, beside=beside) for beside in (9.0, 8.0, 10.0)]
    found = compare_scenarios(timed, light)
    assert found["batch_beside_light_online_vs_alone"] == pytest.approx(
        {"value": 0.9, "low": 0.8, "high": 1.0}
    )
    assert found["online_ttft_p95_under_batch_vs_idle_4_clients"]["value"] == pytest.approx(3.0)
    assert found["online_pruned_vs_dense"] == {"value": 2.0, "low": 1.0, "high": 4.0}
    assert found["online_p95_under_batch_vs_idle"] == pytest.approx(
        {"value": 3.0, "low": 2.0, "high": 4.0}
    )


@pytest.mark.slow
def test_requests_are_answered_idle_and_beside_a_job(
    serving: str, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "_SETTLING_SECONDS", 0.5)
    size = replace(
        SMALL, rounds=1, requests={1: 2, 4: 8, 16: 16}, batch_rows=3072, light_requests=2, pause=0.5
    )
    found = run_online_suite("tiny-llava", size=size, quick=True, root=s3, console=QUIET)
    assert found["suite"] == "online"
    assert [case["case"] for case in found["cases"]] == [
        scenario.name for scenario in list_scenarios(size)
    ]
    for case, scenario in zip(found["cases"], list_scenarios(size), strict=True):
        assert (case["requests"], case["errors"]) == (size.requests[scenario.clients], 0)
        assert case["requests_per_second"]["low"] > 0
        for figure in ("latency", "ttft"):
            assert 0 < case[f"{figure}_p50_ms"]["value"] <= case[f"{figure}_p95_ms"]["value"]
        assert case["ttft_p50_ms"]["value"] <= case["latency_p50_ms"]["value"]
        assert (case["batch_rows_per_second"] is not None) == scenario.under_batch
    assert set(found["ratios"]) == {
        "online_pruned_vs_dense",
        "online_p95_under_batch_vs_idle",
        "online_ttft_p95_under_batch_vs_idle_1_clients",
        "online_ttft_p95_under_batch_vs_idle_4_clients",
        "batch_beside_light_online_vs_alone",
    }


@pytest.mark.slow
def test_a_job_that_finishes_before_the_requests_is_an_error(serving: str, s3: str) -> None:
    write_corpus(f"{s3}/corpus", draw_captioned(48, 0), 16)
    served = EngineSettings(model="tiny-llava", revision=resolve_model("tiny-llava").revision)
    with (
        open_fleet(FleetSettings(engine=served)) as fleet,
        BatchJob(fleet, f"{s3}/corpus", f"{s3}/labels") as job,
    ):
        job.check()
        with pytest.raises(UsageError, match="give a slower --model"):
            keep_checking(job, seconds=100)


def keep_checking(job: BatchJob, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job.check()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_that_fails_is_reported_with_its_output(serving: str, s3: str) -> None:
    served = EngineSettings(model="tiny-llava", revision=resolve_model("tiny-llava").revision)
    with (
        open_fleet(FleetSettings(engine=served)) as fleet,
        pytest.raises(RunError, match=r"(?s)ended with status 2.*check --input"),
        BatchJob(fleet, f"{s3}/nothing", f"{s3}/labels"),
    ):
        pass
