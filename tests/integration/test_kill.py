"""Kills of the driver and of a replica, on a real S3 server: no row is lost or duplicated."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.demo.local_s3 import LocalS3
from cluster.output.run_output import RunOutput
from cluster.store import ObjectInfo, open_store
from jobs.make_corpus import make_corpus
from tests.chaos.processes import children
from tests.integration.checks import check_every_row_once, check_pruned, committed

pytestmark = pytest.mark.slow

ROWS = 1200
REPOSITORY = Path(__file__).parents[2]


class Job:
    """The command that a user types, on its own local Ray."""

    def __init__(self, s3: str, log: Path) -> None:
        self._log = log
        command = [sys.executable, "jobs/caption_corpus.py", "--input", f"{s3}/corpus",
                   "--output", f"{s3}/labels"]  # fmt: skip
        environment = {
            "RAY_ADDRESS": "local",
            "SPPRUNER_LOG_LEVEL": "debug",
            "PYTHONFAULTHANDLER": "1",  # SIGABRT makes it say where it is
        }
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=os.environ | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def printed(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Until `condition` holds, while the command runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            code = self._process.poll()
            assert code is None, f"ended with {code} before {what}: {self.printed()[-6000:]}"
            if time.monotonic() > deadline:
                listed = "\n".join(children(self._process.pid))
                self.send(signal.SIGABRT)
                self._process.wait(timeout=60)
                said = f"{listed}\n{self.printed()[-6000:]}"
                pytest.fail(f"no {what} within {seconds} s, children: {said}")
            time.sleep(0.1)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def has_child(self, name: str) -> bool:
        return any(name in title for title in children(self._process.pid))

    def wait(self, seconds: float) -> int:
        """Its exit code."""
        return self._process.wait(timeout=seconds)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(timeout=60)


@pytest.fixture
def start_job(s3: str, tmp_path: Path) -> Iterator[Callable[[], Job]]:
    jobs: list[Job] = []

    def start() -> Job:
        jobs.append(Job(s3, tmp_path / f"job-{len(jobs)}.log"))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


def units_committed(s3: str) -> dict[str, ObjectInfo]:
    store = open_store(f"{s3}/labels")
    ids = RunOutput(store).committed_units()
    return {id: i for i in store.list(suffixes=(".parquet",)) if (id := unit_of(i.key)) in ids}


def unit_of(key: str) -> str:
    """`<run id>-<unit id>.parquet` → the unit's id."""
    return key.removesuffix(".parquet").rpartition("-")[2]


@pytest.mark.timeout(600)
def test_the_same_command_resumes_after_a_killed_driver(
    start_job: Callable[[], Job], s3: str, s3_server: LocalS3
) -> None:
    make_corpus(kind="caption", rows=ROWS, output=f"{s3}/corpus")
    job = start_job()
    job.wait_for(lambda: len(units_committed(s3)) >= 1, 240, "first commit")
    job.send(signal.SIGKILL)
    job.wait(60)
    time.sleep(3)  # writes in progress when the driver died may still complete
    before = units_committed(s3)
    assert 0 < len(before) < 5, "the run ended before the kill"

    again = start_job()
    code, printed = again.wait(300), again.printed()
    assert code == 0, printed[-3000:]
    assert f"{len(before)} units done before" in printed
    after = units_committed(s3)
    todo = after.keys() - before.keys()
    for event in ("unit_read", "unit_labelled"):
        units = set(re.findall(rf"event={event}.* unit_id=(\w+)", printed))
        assert units == todo, f"{event}: committed units were processed again"
    assert {id: after[id] for id in before} == before, "a committed unit was written again"
    rows = committed(f"{s3}/labels")
    check_every_row_once(rows, ROWS)
    check_pruned(rows, tokens=144, kept=32)


@pytest.mark.timeout(600)
def test_a_terminated_driver_ends_as_stopped_and_keeps_what_it_committed(
    start_job: Callable[[], Job], s3: str, s3_server: LocalS3
) -> None:
    """`ray job stop` and every scheduler send SIGTERM, and kill a few seconds later."""
    make_corpus(kind="caption", rows=ROWS, output=f"{s3}/corpus")
    job = start_job()
    job.wait_for(lambda: len(units_committed(s3)) >= 1, 240, "first commit")
    job.send(signal.SIGTERM)
    code, printed = job.wait(60), job.printed()
    assert code == 143, printed[-3000:]
    assert "stopped: committed units stay; the same command resumes" in printed
    assert "Traceback" not in printed
    assert "SIGTERM received" not in printed, "Ray dumped its stack"
    assert 0 < len(units_committed(s3)) < 5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", ["Ray starts", "Ray ends", "all is reported"])
def test_a_driver_that_is_told_to_end_at_its_beginning_or_end_says_so(
    moment: str, start_job: Callable[[], Job], s3: str, s3_server: LocalS3
) -> None:
    """Ray has handlers of its own for both, and Python none at its very end."""
    make_corpus(kind="caption", rows=8, output=f"{s3}/corpus")
    job = start_job()
    job.wait_for(lambda: job.has_child("gcs_server"), 120, "start of Ray")
    if moment != "Ray starts":
        job.wait_for(lambda: len(units_committed(s3)) == 1, 240, "commit")
        job.wait_for(lambda: not job.has_child("gcs_server"), 60, "end of Ray")
    if moment == "all is reported":
        job.wait_for(lambda: RunOutput.open(f"{s3}/labels").summary() is not None, 60, "summary")
    job.send(signal.SIGTERM)
    code, printed = job.wait(120), job.printed()
    if moment == "all is reported" and code == 0:
        return  # it had ended
    assert code == 143, printed[-3000:]
    assert printed.count("stopped: committed units stay; the same command resumes") == 1
    assert "Traceback" not in printed
    assert "SIGTERM received" not in printed, "Ray dumped its stack"


@pytest.mark.timeout(600)
def test_a_killed_replica_loses_no_row(
    start_job: Callable[[], Job], s3: str, s3_server: LocalS3
) -> None:
    make_corpus(kind="caption", rows=ROWS, output=f"{s3}/corpus")
    job = start_job()
    job.wait_for(lambda: len(units_committed(s3)) >= 1, 240, "first commit")
    ready = re.findall(r"pid=(\d+)\).*event=replica_ready", job.printed())
    (replica,) = {int(pid) for pid in ready}
    os.kill(replica, signal.SIGKILL)
    code, printed = job.wait(400), job.printed()
    assert code == 0, printed[-3000:]
    assert "event=replica_died" in printed, "no call was in flight, so the kill tested nothing"
    rows = committed(f"{s3}/labels")
    check_every_row_once(rows, ROWS)
    check_pruned(rows, tokens=144, kept=32)
    assert max(row["attempts"] for row in rows) > 1
