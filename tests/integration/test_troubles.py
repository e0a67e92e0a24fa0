"""The troubles of a long run, one job each, on a real cluster of two nodes behind an S3 server:
the run completes, no row is lost, and the summary says what happened.
"""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.output.run_output import RunOutput
from cluster.store import open_store
from tests.chaos.corpus import PROMPT
from tests.chaos.engine import CALM, KILLS, expected_text
from tests.chaos.ground import Ground
from tests.chaos.places import LocalPlace, Place, S3Place
from tests.chaos.processes import find_workers, send
from tests.cluster.images.pictures import slow_jpeg
from tests.integration.checks import check_every_row_once, committed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS, UNIT_ROWS = 240, 12
_OUTAGE_SECONDS = 120.0


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground() as prepared:
        yield prepared


@pytest.fixture
def place(ground: Ground, request: pytest.FixtureRequest) -> Iterator[S3Place]:
    ground.prepare(2, attached=False)
    ground.proxy.begin(seed=0, rate=0.0)
    bucket = request.node.name.replace("_", "-")[:60]
    opened = S3Place(bucket, ground.server.endpoint, ground.proxy)
    yield opened
    opened.close()


def picture(number: int, behaviour: int = CALM) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6), (number % 256, number // 256, behaviour)).save(buffer, "PNG")
    return buffer.getvalue()


def put_rows(place: Place, images: list[bytes]) -> None:
    table = pa.table({"key": [f"{n:04}" for n in range(len(images))], "image": images})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=UNIT_ROWS)
    place.put_corpus({"rows.parquet": buffer.getvalue()})


def check_rows(place: Place) -> list[dict[str, Any]]:
    """The committed rows: each of the corpus once, in its place, with its own text."""
    rows = committed(place.output)
    check_every_row_once(rows, ROWS)
    assert [row["key"] for row in rows] == [f"{number:04}" for number in range(ROWS)]
    for number, row in enumerate(rows):
        if row["error_code"] is None:
            with Image.open(io.BytesIO(picture(number))) as image:
                assert row["text"] == expected_text(image, PROMPT)
    return rows


class Job:
    """The command with the fake engine, in a process of its own."""

    def __init__(self, ground: Ground, place: Place, log: Path) -> None:
        self._ground, self._log, self._place = ground, log, place
        settings = {
            "task": "caption",
            "input": place.input,
            "output": place.output,
            "replicas": 1,
            "unit_rows": UNIT_ROWS,
            "engine": {**ground.engine_options, "tag": log.parent.name},
        }
        self.pid = ground.forks.start(
            "tests.chaos.driver",
            json.dumps(settings),
            log=log,
            environment={"RAY_ADDRESS": ground.address},
        )

    def wait_for(self, commits: int) -> None:
        """Until so many units are committed."""
        self.wait_until(lambda: self._place.commits() >= commits, 240.0)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._ground.forks.code(self.pid) is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def end(self, code: int, seconds: float) -> None:
        """It ends with `code` within `seconds`."""
        ended = self._ground.forks.wait(self.pid, seconds)
        if ended is None:
            send(self.pid, signal.SIGKILL)
        assert ended == code, self.log()

    def finish(self, code: int, seconds: float) -> dict[str, Any]:
        """The summary of the run, which ends with `code` within `seconds`."""
        self.end(code, seconds)
        summary: dict[str, Any] = json.loads(
            open_store(self._place.output).get("_run/summary.json")
        )
        return summary

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]


@pytest.fixture
def start(ground: Ground, tmp_path: Path) -> Callable[..., Job]:
    def start_job(place: Place) -> Job:
        return Job(ground, place, tmp_path / "job.log")

    return start_job


def test_a_stopped_replica_is_replaced(
    ground: Ground, place: S3Place, start: Callable[..., Job]
) -> None:
    put_rows(place, [picture(number) for number in range(ROWS)])
    job = start(place)
    job.wait_for(commits=2)
    (replica,) = find_workers("replica", ground.raylets())
    send(replica, signal.SIGSTOP)
    summary = job.finish(0, seconds=360.0)  # it counts as hung after 120 s
    assert summary["state"] == "completed"
    assert summary["attempt"]["events"]["replica_died"] == 1, job.log()
    assert "1 replica died" in job.log()
    rows = check_rows(place)
    assert not any(row["error_code"] for row in rows)


def test_a_picture_that_takes_minutes_to_decode_costs_its_row(
    place: S3Place, start: Callable[..., Job]
) -> None:
    images = [picture(number) for number in range(ROWS)]
    images[100] = slow_jpeg(scans=100_000, side=2000)
    put_rows(place, images)
    job = start(place)
    summary = job.finish(3, seconds=300.0)
    assert summary["state"] == "completed_with_errors"
    assert summary["rows_failed"] == {"image_too_slow": 1}
    assert "image_too_slow 1" in job.log()
    rows = check_rows(place)
    assert [row["key"] for row in rows if row["error_code"]] == ["0100"]


def test_a_row_that_kills_its_replica_is_found(place: S3Place, start: Callable[..., Job]) -> None:
    images = [picture(number) for number in range(ROWS)]
    images[100] = picture(100, KILLS)
    put_rows(place, images)
    job = start(place)
    summary = job.finish(3, seconds=300.0)
    assert summary["rows_failed"] == {"poison_row": 1}
    assert summary["attempt"]["events"]["row_quarantined"] >= 1
    assert 1 < summary["attempt"]["events"]["replica_died"] <= 4
    assert "quarantined" in job.log()
    rows = check_rows(place)
    assert [row["key"] for row in rows if row["error_code"]] == ["0100"]


def test_a_store_that_is_away_for_two_minutes_costs_time(
    ground: Ground, place: S3Place, start: Callable[..., Job]
) -> None:
    put_rows(place, [picture(number) for number in range(ROWS)])
    job = start(place)
    job.wait_for(commits=2)
    before = place.commits()
    ground.proxy.start_outage("slow_down")
    time.sleep(_OUTAGE_SECONDS)
    assert place.commits() - before <= 4, "the store was not away"
    ground.proxy.stop_outage()
    summary = job.finish(0, seconds=240.0)
    assert summary["state"] == "completed"
    assert summary["attempt"]["events"]["store_waited"] >= _OUTAGE_SECONDS / 2
    assert "store away for" in job.log()
    rows = check_rows(place)
    assert not any(row["error_code"] for row in rows)


def test_a_driver_whose_cluster_is_gone_ends_and_the_same_command_completes(
    ground: Ground, place: S3Place, start: Callable[..., Job]
) -> None:
    """Unlike a submitted job it does not die with the head, and nothing can be reached any more."""
    put_rows(place, [picture(number) for number in range(ROWS)])
    job = start(place)
    job.wait_for(commits=2)
    ground.remove_cluster()
    assert ground.forks.wait(job.pid, 180.0) not in (None, 0, 3), job.log()
    ground.start_cluster()
    assert start(place).finish(0, seconds=240.0)["state"] == "completed"
    rows = check_rows(place)
    assert not any(row["error_code"] for row in rows)


@pytest.fixture(params=[""])
def node_without_mount(
    ground: Ground, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """A second node, which sees another folder where the first sees corpus and output: an empty
    one, but for what a shell command writes there."""
    ground.prepare(1, attached=False)
    folder = tmp_path / "place"
    folder.mkdir(parents=True)
    hide = f"mount -t tmpfs none {folder} && cd {folder} && {request.param or 'true'}"
    if subprocess.run(["unshare", "--mount", "sh", "-c", hide], capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    ray = Path(sys.executable).with_name("ray")
    join = f"{ray} start --address={ground.address} --num-cpus=4 --block"
    node = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"{hide} && exec {join}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield folder
    node.terminate()
    node.wait(timeout=60)
    ground.spoil()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_node_without_the_mount_costs_no_row(
    node_without_mount: Path, start: Callable[..., Job]
) -> None:
    place = LocalPlace(node_without_mount)
    put_rows(place, [picture(number) for number in range(ROWS)])
    job = start(place)
    summary = job.finish(0, seconds=240.0)
    assert summary["state"] == "completed"
    assert summary["attempt"]["events"]["unit_moved"] > 0, job.log()
    assert "moved to another node" in job.log()
    rows = check_rows(place)
    assert not any(row["error_code"] for row in rows)
    assert RunOutput.open(place.output).summary() is not None


@pytest.mark.parametrize(
    "node_without_mount",
    ["""mkdir -p disk/labels/_run && echo '{"run_id": "1"}' > disk/labels/_run/manifest.json"""],
    indirect=True,
)
def test_a_driver_on_the_node_without_the_mount_labels_nothing(
    node_without_mount: Path, start: Callable[..., Job]
) -> None:
    """The others see a run where it sees none."""
    place = LocalPlace(node_without_mount)
    put_rows(place, [picture(number) for number in range(UNIT_ROWS)])
    job = start(place)
    job.end(2, seconds=120.0)
    assert "on 1 of 1 other nodes" in job.log()
    assert not list(Path(place.output).glob("*.parquet"))
