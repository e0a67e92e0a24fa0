"""Kills of the driver and of a replica, on a real S3 server: no row is lost or duplicated."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.demo.local_s3 import LocalS3
from cluster.output.run_output import RunOutput
from cluster.store import ObjectInfo, open_store
from jobs.make_corpus import make_corpus
from tests.integration.checks import check_every_row_once, check_pruned, committed

pytestmark = pytest.mark.slow

ROWS = 1200
REPOSITORY = Path(__file__).parents[2]


def start_job(s3: str) -> subprocess.Popen[str]:
    """The command that a user types, on its own local Ray."""
    command = [sys.executable, "jobs/caption_corpus.py", "--input", f"{s3}/corpus",
               "--output", f"{s3}/labels"]  # fmt: skip
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"RAY_ADDRESS": "local", "SPPRUNER_LOG_LEVEL": "debug"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.1)


def units_committed(s3: str) -> dict[str, ObjectInfo]:
    store = open_store(f"{s3}/labels")
    ids = RunOutput(store).committed_units()
    return {id: i for i in store.list(suffixes=(".parquet",)) if (id := unit_of(i.key)) in ids}


def unit_of(key: str) -> str:
    """`<run id>-<unit id>.parquet` → the unit's id."""
    return key.removesuffix(".parquet").rpartition("-")[2]


@pytest.mark.timeout(600)
def test_the_same_command_resumes_after_a_killed_driver(s3: str, s3_server: LocalS3) -> None:
    make_corpus(kind="caption", rows=ROWS, output=f"{s3}/corpus")
    job = start_job(s3)
    wait_for(lambda: len(units_committed(s3)) >= 1, 240, "a first commit")
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    time.sleep(3)  # writes in progress when the driver died may still complete
    before = units_committed(s3)
    assert 0 < len(before) < 5, "the run ended before the kill"

    again = start_job(s3)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed[-3000:]
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
    s3: str, s3_server: LocalS3
) -> None:
    """`ray job stop` and every scheduler send SIGTERM, and kill a few seconds later."""
    make_corpus(kind="caption", rows=ROWS, output=f"{s3}/corpus")
    job = start_job(s3)
    wait_for(lambda: len(units_committed(s3)) >= 1, 240, "a first commit")
    os.kill(job.pid, signal.SIGTERM)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 143, printed[-3000:]
    assert "stopped: committed units stay; the same command resumes" in printed
    assert "Traceback" not in printed
    assert "SIGTERM received" not in printed, "Ray dumped its stack"
    assert 0 < len(units_committed(s3)) < 5


def has_child(pid: int, name: str) -> bool:
    listed = subprocess.run(
        ["ps", "-o", "args=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return name in listed.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", ["Ray starts", "Ray ends", "all is reported"])
def test_a_driver_that_is_told_to_end_at_its_beginning_or_end_says_so(
    moment: str, s3: str, s3_server: LocalS3
) -> None:
    """Ray has handlers of its own for both, and Python none at its very end."""
    make_corpus(kind="caption", rows=8, output=f"{s3}/corpus")
    job = start_job(s3)
    wait_for(lambda: has_child(job.pid, "gcs_server"), 120, "Ray's start")
    if moment != "Ray starts":
        wait_for(lambda: len(units_committed(s3)) == 1, 240, "a commit")
        wait_for(lambda: not has_child(job.pid, "gcs_server"), 60, "Ray's end")
    if moment == "all is reported":
        wait_for(lambda: RunOutput.open(f"{s3}/labels").summary() is not None, 60, "a summary")
    os.kill(job.pid, signal.SIGTERM)
    printed, _ = job.communicate(timeout=120)
    if moment == "all is reported" and job.returncode == 0:
        return  # it had ended
    assert job.returncode == 143, printed[-3000:]
    assert printed.count("stopped: committed units stay; the same command resumes") == 1
    assert "Traceback" not in printed
    assert "SIGTERM received" not in printed, "Ray dumped its stack"


@pytest.mark.timeout(600)
def test_a_killed_replica_loses_no_row(s3: str, s3_server: LocalS3) -> None:
    make_corpus(kind="caption", rows=ROWS, output=f"{s3}/corpus")
    job = start_job(s3)
    assert job.stdout is not None
    printed: list[str] = []
    reader = threading.Thread(target=lambda: printed.extend(job.stdout or ()))
    reader.start()
    wait_for(lambda: len(units_committed(s3)) >= 1, 240, "a first commit")
    ready = [re.search(r"pid=(\d+)\).*event=replica_ready", line) for line in printed]
    (replica,) = {int(found.group(1)) for found in ready if found}
    os.kill(replica, signal.SIGKILL)
    job.wait(timeout=400)
    reader.join()
    job.stdout.close()
    text = "".join(printed)
    assert job.returncode == 0, text[-3000:]
    assert "event=replica_died" in text, "no call was in flight, so the kill tested nothing"
    rows = committed(f"{s3}/labels")
    check_every_row_once(rows, ROWS)
    check_pruned(rows, tokens=144, kept=32)
    assert max(row["attempts"] for row in rows) > 1
