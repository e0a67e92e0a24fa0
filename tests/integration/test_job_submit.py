"""`ray job submit` to a cluster started by `ray start --head`, with the commands a user types."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from cluster.demo.local_s3 import LocalS3
from jobs.make_corpus import make_corpus
from tests.integration.checks import check_every_row_once, check_pruned, committed

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
ROWS = 400


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts_jobs(url: str) -> bool:
    """Whether the node accepts jobs. Its dashboard responds some seconds before its job agent."""
    try:
        JobSubmissionClient(url).submit_job(entrypoint="true")
    except (ConnectionError, RuntimeError):
        return False
    return True


@pytest.fixture
def head(s3_server: LocalS3, tmp_path: Path) -> Iterator[str]:
    """The dashboard address of a new head node. Its workers inherit the store's variables from its
    environment, as they would from an instance role."""
    # Free ports for everything that jobs use: the session's Ray may hold the default ones.
    port, dashboard, agent = free_port(), free_port(), free_port()
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=4",
               f"--port={port}", f"--dashboard-port={dashboard}",
               f"--dashboard-agent-listen-port={agent}",
               "--object-store-memory=300000000"]  # fmt: skip
    log = (tmp_path / "head.log").open("w")
    # Submitted commands run `python`, which on a node is the one of the active environment.
    active = os.environ | {"PATH": f"{Path(RAY).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=active)
    url = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 120
    while not accepts_jobs(url):
        assert process.poll() is None, (tmp_path / "head.log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
        time.sleep(0.5)
    yield url
    os.killpg(process.pid, signal.SIGTERM)  # with --block this stops the node too
    process.wait(timeout=60)
    log.close()


@pytest.mark.timeout(600)
def test_a_submitted_job_labels_its_corpus_and_shows_progress(head: str, s3: str) -> None:
    make_corpus(kind="caption", rows=ROWS, output=f"{s3}/corpus")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}

    def ray(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [RAY, "job", *arguments],
            cwd=REPOSITORY,
            env=environment | {"RAY_ADDRESS": head},
            text=True,
            capture_output=True,
            timeout=400,
        )

    entry = ["python", "jobs/caption_corpus.py", "--input", f"{s3}/corpus",
             "--output", f"{s3}/labels"]  # fmt: skip
    submitted = ray("submit", "--working-dir", ".", "--submission-id", "labels-1", "--", *entry)
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-3000:]
    logs = ray("logs", "labels-1").stdout
    assert f"progress  {ROWS}/{ROWS} rows" in logs
    assert "ETA" in logs
    assert "visual tokens" in logs
    rows = committed(f"{s3}/labels")
    check_every_row_once(rows, ROWS)
    check_pruned(rows, tokens=144, kept=32)
