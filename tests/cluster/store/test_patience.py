"""Trouble shorter than the patience costs time alone; trouble that stays is said, once."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cluster.events import RunEvent
from cluster.store import Patience, open_store
from cluster.store.patience import hear_outages
from tests.cluster.store.clock import FakeClock


class Trouble(Exception):
    """Passes."""


def passing(error: Exception) -> str | None:
    return "trouble" if isinstance(error, Trouble) else None


def server_with_outage(
    clock: FakeClock, begin: float, end: float, slow: float
) -> Callable[[], float]:
    """Takes `slow` seconds a call, and fails calls that begin within [begin, end)."""

    def call() -> float:
        began = clock.now()
        clock.time += slow
        if begin <= began < end:
            raise Trouble
        return began

    return call


seconds, attempts = st.floats(0, 2_000), st.floats(0, 70)


@given(patience=st.floats(1, 1_000), begin=seconds, share=st.floats(0, 0.999), slow=attempts)
def test_an_outage_shorter_than_the_patience_costs_time_alone(
    patience: float, begin: float, share: float, slow: float
) -> None:
    clock = FakeClock()
    clock.time = begin  # the worst moment to call
    call = server_with_outage(clock, begin, begin + share * patience, slow)
    answered = Patience(seconds=patience, clock=clock).retry("s3://b", call, passing)
    assert answered >= begin + share * patience
    assert clock.time <= begin + patience + 2 * slow + 1e-6


@given(patience=st.floats(0, 1_000), slow=attempts)
def test_an_outage_that_stays_ends_with_its_own_error(patience: float, slow: float) -> None:
    clock = FakeClock()
    call = server_with_outage(clock, 0, float("inf"), slow)
    with pytest.raises(Trouble):
        Patience(seconds=patience, clock=clock).retry("s3://b", call, passing)
    assert patience - 1e-6 <= clock.time <= patience + 2 * slow + 1e-6


def test_an_error_that_stays_is_raised_at_once() -> None:
    clock, calls = FakeClock(), []

    def call() -> None:
        calls.append(1)
        raise KeyError

    with pytest.raises(KeyError):
        Patience(clock=clock).retry("s3://b", call, passing)
    assert (len(calls), clock.time) == (1, 0)


def test_callers_that_failed_together_do_not_come_back_together() -> None:
    """A thousand readers that all wait 20 s would stop the server again."""
    moments = set()
    for _ in range(50):
        clock = FakeClock()
        call = server_with_outage(clock, 0, 60, 0)
        moments.add(round(Patience(clock=clock).retry("s3://b", call, passing)))
    assert len(moments) > 8


def test_an_outage_is_logged_once_however_many_wait_and_again_when_it_is_over() -> None:
    barrier = threading.Barrier(8)

    def wait(_: int) -> None:
        clock = FakeClock()
        begun: list[int] = []

        def call() -> None:
            if not begun:
                begun.append(barrier.wait())
            if clock.now() < 100:
                raise Trouble
            barrier.wait()  # nobody leaves before all have failed

        Patience(clock=clock).retry("s3://shared", call, passing)

    with capture_logs() as logs, ThreadPoolExecutor(8) as pool:
        list(pool.map(wait, range(8)))
    assert [entry["event"] for entry in logs] == ["store_not_answering", "store_answers_again"]
    assert {entry["log_level"] for entry in logs} == {"warning"}
    assert logs[0]["reason"] == "trouble"
    assert logs[0]["patience_s"] == 600
    assert logs[1]["seconds"] >= 100


@pytest.mark.parametrize(("lasts", "told"), [(120.0, True), (1_000.0, True), (2.0, False)])
def test_an_outage_is_told_with_its_seconds_whether_it_ended_or_not(
    lasts: float, told: bool
) -> None:
    clock, heard = FakeClock(), list[int]()

    def on_event(kind: RunEvent, seconds: int) -> None:
        assert kind is RunEvent.STORE_WAITED
        heard.append(seconds)

    call = server_with_outage(clock, 0, lasts, 0.1)
    with hear_outages(on_event), suppress(Trouble):
        Patience(seconds=600, clock=clock).retry("s3://b", call, passing)
    expected = [pytest.approx(min(lasts, 600), abs=21)] if told else []
    assert heard == expected
    with suppress(Trouble):
        Patience(seconds=600, clock=clock).retry(
            "s3://b", server_with_outage(clock, 0, 1e9, 1), passing
        )
    assert heard == expected, "nobody listens any more"


def test_a_blip_is_not_logged() -> None:
    clock = FakeClock()
    with capture_logs() as logs:
        call = server_with_outage(clock, 0, 0.1, 0)
        Patience(clock=clock).retry("s3://b", call, passing)
    assert logs == []


@pytest.mark.parametrize("uri", ["s3://bucket/x", "/tmp/x"])
def test_the_patience_travels_with_the_store(uri: str) -> None:
    store = pickle.loads(pickle.dumps(open_store(uri).with_patience(7)))
    assert store._patience.seconds == 7
    assert open_store(uri)._patience.seconds == 600
