"""Suite `online`: what its clients count and time, and what each of its figures compares."""

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
from cluster.errors import RunError, UsageError
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import Fleet, open_fleet
from jobs.suites import online as suite
from jobs.suites.background import BatchJob
from jobs.suites.corpora import captioned, write_corpus
from jobs.suites.load import Answered, Failed, Load, chat_body, closed_loop, percentile_ms
from jobs.suites.online import FULL, QUICK, Extent, Timed, Way, in_turns, online, ratios, ways
from sppruner import DENSE, Budget, PruneSpec
from sppruner.models.loading import resolve_model
from tests.cluster.fake_engine import picture

QUIET = Console(quiet=True)
SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.25))
SMALL = Extent(rounds=2, requests={1: 1, 4: 2, 16: 3}, batch_rows=3)


def load(*latencies: float, seconds: float = 1.0, errors: int = 0) -> Load:
    answered = tuple(Answered(first_words=end / 2, end=end) for end in latencies)
    return Load(seconds=seconds, answered=answered, errors=("no",) * errors)


def test_percentiles_lie_between_the_values_beside_them() -> None:
    seconds = [0.1 * n for n in range(1, 12)]
    assert percentile_ms(seconds, 50) == pytest.approx(600)
    assert percentile_ms(seconds[::-1], 95) == pytest.approx(1050)
    assert percentile_ms([0.2], 95) == pytest.approx(200)


def test_requests_that_failed_are_neither_speed_nor_latency() -> None:
    found = load(0.2, 0.4, seconds=4.0, errors=6)
    assert found.requests_per_second == 0.5
    assert found.latency_ms(50) == pytest.approx(300)
    assert found.first_words_ms(50) == pytest.approx(150)


def test_as_many_requests_are_under_way_as_there_are_clients_and_none_is_sent_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    under_way = most = 0
    sent: list[bytes] = []

    async def ask(http: httpx.AsyncClient, url: str, body: bytes) -> Answered:
        nonlocal under_way, most
        sent.append(body)
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        if body == b"3":
            raise Failed("no")
        return Answered(first_words=0.1, end=0.2)

    monkeypatch.setattr(jobs.suites.load, "_ask", ask)
    bodies = [b"%d" % number for number in range(20)]
    found = closed_loop("http://nowhere", bodies, 4)
    assert most == 4
    assert sorted(sent) == sorted(bodies)
    assert (len(found.answered), found.errors) == (19, ("Failed: no",))


@dataclass
class Clock:
    now: float = 10.0

    def perf_counter(self) -> float:
        return self.now


def asked(*chunks: dict[str, Any], status: int = 200, clock: Clock | None = None) -> Answered:
    """What one client makes of an answer whose chunks come a second apart."""
    clock = clock or Clock()

    async def pieces() -> AsyncGenerator[bytes]:
        for chunk in chunks:
            clock.now += 1
            yield f"data: {json.dumps(chunk)}\n\n".encode()
        yield b"data: [DONE]\n\n"

    async def ask() -> Answered:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, content=pieces()))
        async with httpx.AsyncClient(transport=transport) as http:
            return await jobs.suites.load._ask(http, "http://nowhere", b"{}")

    return asyncio.run(ask())


def chunk(content: str = "", finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": content}, "finish_reason": finish}]}


def test_first_words_are_the_first_with_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(jobs.suites.load, "time", clock)
    found = asked(chunk(""), chunk("a"), chunk("b"), chunk(finish="stop"), clock=clock)
    assert found == Answered(first_words=2.0, end=4.0)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda: asked(chunk("a")), "ended before"),
        (lambda: asked(chunk("a"), {"error": {"code": "overloaded"}}), "overloaded"),
        (lambda: asked(status=503), "503"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(answer: Callable[[], Answered], why: str) -> None:
    with pytest.raises(Failed, match=why):
        answer()


def test_clients_ask_the_real_endpoint_with_the_budget_of_the_spec(fleet: Fleet) -> None:
    bodies = [
        chat_body("fake-model", "p", picture(n), spec=(DENSE, SPEC)[n % 2], max_tokens=8)
        for n in range(6)
    ]
    wrong = chat_body("other-model", "p", picture(9), spec=DENSE, max_tokens=8)
    kept = [json.loads(body).get("prune") for body in bodies]
    assert kept == [None, {"method": "sppruner", "retain": 0.25}] * 3
    found = closed_loop(fleet.http_url, [*bodies, wrong], 3)
    assert len(found.answered) == 6
    assert all(0 < one.first_words <= one.end <= found.seconds for one in found.answered)
    assert ["other-model" in error for error in found.errors] == [True]


@dataclass
class Recorded:
    """A fleet that notes down who asks it for what. rows: that it says it has answered."""

    model: str = "m"
    http_url: str = "http://nowhere"
    rows: int = 0

    def __post_init__(self) -> None:
        self.sent: list[tuple[list[bytes], int, bool]] = []
        self.batch = False
        self.fails = False

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(rows=self.rows)

    def closed_loop(self, base_url: str, bodies: list[bytes], clients: int) -> Load:
        self.sent.append((bodies, clients, self.batch))
        self.rows += len(bodies) + 7 * self.batch
        if self.fails:
            return load(errors=len(bodies))
        return load(*(0.1 for _ in bodies))

    @contextmanager
    def batch_job(self, *_: object, units: int) -> Iterator[SimpleNamespace]:
        assert units == 1
        self.batch = True
        yield SimpleNamespace(check=lambda: None)
        self.batch = False


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    fleet = Recorded()
    monkeypatch.setattr(jobs.suites.load, "closed_loop", fleet.closed_loop)
    monkeypatch.setattr(suite, "BatchJob", fleet.batch_job)
    monkeypatch.setattr(suite, "write_corpus", lambda *_: None)
    return fleet


def pruned(body: bytes) -> bool:
    return "prune" in json.loads(body)


def test_rounds_alternate_and_ask_about_every_image_once(recorded: Recorded) -> None:
    timed = in_turns(cast(Fleet, recorded), SMALL, root="", told=QUIET)
    order = [
        Way(pruned=pruned(bodies[0]), clients=clients, under_batch=batch)
        for bodies, clients, batch in recorded.sent
    ]
    warm, first, second = order[:2], order[2:12], order[12:]
    assert [way.clients for way in warm] == [16, 16]
    assert first == ways(SMALL)
    assert second == first[::-1]
    bodies = [body for sent, _, _ in recorded.sent for body in sent]
    images = [json.loads(b)["messages"][0]["content"][0]["image_url"]["url"] for b in bodies]
    assert len(set(images)) == len(images) == 2 * 3 + 2 * (2 * (1 + 2 + 3) + 2 * (1 + 2))
    assert {way: len(rounds) for way, rounds in timed.items()} == dict.fromkeys(ways(SMALL), 2)
    for way, rounds in timed.items():
        for one in rounds:
            assert (one.batch_rows_per_second is not None) == way.under_batch
            assert len(one.load.answered) == SMALL.requests[way.clients]
            if one.batch_rows_per_second is not None:
                assert one.batch_rows_per_second > 0


def test_a_case_without_a_single_answer_stops_the_suite(recorded: Recorded) -> None:
    recorded.fails = True
    with pytest.raises(RunError, match="dense, 16 clients, idle: no request was answered"):
        in_turns(cast(Fleet, recorded), SMALL, root="", told=QUIET)


@pytest.mark.parametrize("extent", [FULL, QUICK])
def test_the_cases_are_those_that_were_promised(extent: Extent) -> None:
    assert [way.name for way in ways(extent)] == [
        f"{tokens}, {clients}, {beside}"
        for beside, all_clients in (
            ("idle", ["1 client", "4 clients", "16 clients"]),
            ("batch job", ["1 client", "4 clients"]),
        )
        for clients in all_clients
        for tokens in ("dense", "22.2 %")
    ]


def test_ratios_compare_the_same_round_of_the_ways_they_name() -> None:
    timed = {
        way: [Timed(load=load(9.0, seconds=9.0), batch_rows_per_second=None)] * 3
        for way in ways(SMALL)
    }

    def give(way: Way, *loads: Load) -> None:
        timed[way] = [Timed(load=one, batch_rows_per_second=None) for one in loads]

    most = Way(pruned=True, clients=16)
    give(most, *(load(1.0, 1.0, seconds=s) for s in (1.0, 0.5, 2.0)))
    give(replace(most, pruned=False), *(load(1.0, seconds=s) for s in (1.0, 1.0, 1.0)))
    some = Way(pruned=True, clients=4)
    give(some, load(0.1), load(0.2), load(0.5))
    give(replace(some, under_batch=True), load(0.3), load(0.4), load(2.0))
    found = ratios(timed)
    assert found["online_pruned_vs_dense"] == {"value": 2.0, "low": 1.0, "high": 4.0}
    assert found["online_p95_under_batch_vs_idle"] == pytest.approx(
        {"value": 3.0, "low": 2.0, "high": 4.0}
    )


@pytest.mark.slow
def test_users_are_answered_idle_and_beside_a_job(serving: str, s3: str) -> None:
    extent = replace(SMALL, rounds=1, requests={1: 2, 4: 8, 16: 16}, batch_rows=2048)
    found = online("tiny-llava", extent=extent, quick=True, root=s3, told=QUIET)
    assert found["suite"] == "online"
    assert [case["case"] for case in found["cases"]] == [way.name for way in ways(extent)]
    for case, way in zip(found["cases"], ways(extent), strict=True):
        assert (case["requests"], case["errors"]) == (extent.requests[way.clients], 0)
        assert case["requests_per_second"]["low"] > 0
        for figure in ("latency", "ttft"):
            assert 0 < case[f"{figure}_p50_ms"]["value"] <= case[f"{figure}_p95_ms"]["value"]
        assert case["ttft_p50_ms"]["value"] <= case["latency_p50_ms"]["value"]
        assert (case["batch_rows_per_second"] is not None) == way.under_batch
    assert set(found["ratios"]) == {"online_pruned_vs_dense", "online_p95_under_batch_vs_idle"}


@pytest.mark.slow
def test_a_job_that_was_over_too_early_is_not_measured_beside(serving: str, s3: str) -> None:
    write_corpus(f"{s3}/corpus", captioned(48, 0), 16)
    served = EngineSettings(model="tiny-llava", revision=resolve_model("tiny-llava").revision)
    with (
        open_fleet(FleetSettings(engine=served)) as fleet,
        BatchJob(fleet, f"{s3}/corpus", f"{s3}/labels", units=3) as job,
    ):
        job.check()
        with pytest.raises(UsageError, match="give a slower --model"):
            check_for(job, seconds=100)


def check_for(job: BatchJob, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job.check()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_that_fails_is_named_with_what_it_said(serving: str, s3: str) -> None:
    served = EngineSettings(model="tiny-llava", revision=resolve_model("tiny-llava").revision)
    with (
        open_fleet(FleetSettings(engine=served)) as fleet,
        pytest.raises(RunError, match=r"(?s)ended with status 2.*check --input"),
        BatchJob(fleet, f"{s3}/nothing", f"{s3}/labels", units=1),
    ):
        pass
