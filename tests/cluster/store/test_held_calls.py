"""A call that a dead network drive holds is named, for as long as it does not come back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cluster.events import RunEvent
from cluster.store import LocalStore, held_calls
from cluster.store.patience import hear_outages


def test_calls_that_are_held_are_named_once_and_told_when_they_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, back, asked = LocalStore(tmp_path), threading.Event(), threading.Barrier(3)
    store.put("a", b"1")
    heard: list[tuple[RunEvent, int]] = []

    def hold(*_: object) -> bytes:
        asked.wait()
        back.wait()
        return b"1"

    monkeypatch.setattr(LocalStore, "_read", hold)
    with (
        capture_logs() as logs,
        hear_outages(lambda kind, seconds: heard.append((kind, seconds))),
        ThreadPoolExecutor() as pool,
    ):
        reads = [pool.submit(store.get, "a") for _ in range(2)]
        asked.wait()
        began = time.monotonic()
        held_calls.look(began + 10)
        assert not logs
        for seconds in (31, 60, 300):
            held_calls.look(began + seconds)
        (entry,) = logs
        assert (entry["event"], entry["reason"]) == ("store_not_answering", "held")
        assert entry["uri"] == str(tmp_path)
        assert not heard
        monkeypatch.setattr("cluster.store.held_calls.time.monotonic", lambda: began + 400)
        back.set()
        assert [read.result() for read in reads] == [b"1", b"1"]
    assert [entry["event"] for entry in logs] == ["store_not_answering", "store_answers_again"]
    assert heard == [(RunEvent.STORE_WAITED, 400)]


def test_a_held_call_that_ends_in_an_error_is_no_answer(tmp_path: Path) -> None:
    """A soft mount gives up by itself."""

    def fail() -> None:
        with held_calls.watched("/mnt/a", 600):
            held_calls.look(time.monotonic() + 31)
            raise OSError("gone")

    with capture_logs() as logs, pytest.raises(OSError, match="gone"):
        fail()
    assert [entry["event"] for entry in logs] == ["store_not_answering"]


def test_a_walk_over_many_files_may_take_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)

    def walk(*_: object) -> Iterator[object]:
        held_calls.look(time.monotonic() + 300)
        return iter(())

    monkeypatch.setattr(LocalStore, "_listed", walk)
    with capture_logs() as logs:
        assert store.list() == []
    assert not logs


def test_somebody_looks_also_in_a_process_that_was_forked(tmp_path: Path) -> None:
    LocalStore(tmp_path).put("a", b"1")
    pid = os.fork()
    if pid == 0:
        LocalStore(tmp_path).put("b", b"1")
        names = [thread.name for thread in threading.enumerate()]
        os._exit(0 if "held-calls" in names else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
