"""The watchdog: kills a replica that is silent, whatever made it so, and no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]

# A process that beats ten times a second, and falls silent as its argument says.
BEATING = """
import os, sys, time
from cluster.serving.watchdog import Watchdog

watchdog = Watchdog()
print(watchdog._process.pid, flush=True)
for beat in range(10_000):
    watchdog.beat(0.5)
    time.sleep(0.1)
    if beat == 5 and sys.argv[1] == "hang":
        time.sleep(60)
    if beat == 5 and sys.argv[1] == "end":
        break
    if beat == 5 and sys.argv[1] == "crash":
        os._exit(3)
"""


@pytest.fixture
def beating(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", BEATING, request.param],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def watchdog_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("beating", ["hang"], indirect=True)
def test_a_silent_process_is_killed_and_its_watchdog_ends(beating: subprocess.Popen[str]) -> None:
    pid = watchdog_of(beating)
    _, said = beating.communicate(timeout=20)
    assert beating.returncode == -signal.SIGKILL
    assert "silent" in said
    assert is_gone(pid)


@pytest.mark.parametrize("beating", ["never"], indirect=True)
def test_a_stopped_process_is_killed(beating: subprocess.Popen[str]) -> None:
    """It cannot end itself."""
    watchdog_of(beating)
    time.sleep(0.5)
    os.kill(beating.pid, signal.SIGSTOP)
    assert beating.wait(timeout=20) == -signal.SIGKILL


@pytest.mark.parametrize("beating", ["never"], indirect=True)
def test_a_killed_watchdog_is_replaced(beating: subprocess.Popen[str]) -> None:
    first = watchdog_of(beating)
    os.kill(first, signal.SIGKILL)
    time.sleep(1.0)
    assert beating.poll() is None
    os.kill(beating.pid, signal.SIGSTOP)
    assert beating.wait(timeout=20) == -signal.SIGKILL


@pytest.mark.parametrize(("beating", "code"), [("end", 0), ("crash", 3)], indirect=["beating"])
def test_the_watchdog_ends_with_its_process(beating: subprocess.Popen[str], code: int) -> None:
    pid = watchdog_of(beating)
    assert beating.wait(timeout=20) == code
    assert is_gone(pid)


def test_the_watchdog_needs_the_standard_library_alone() -> None:
    """It runs beside every replica, and must start before anything can hang."""
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1], run_name='watchdog'); print(*sys.modules)"
    )
    path = REPOSITORY / "cluster/serving/watchdog.py"
    command = [sys.executable, "-I", "-S", "-c", code, str(path)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {name.partition(".")[0] for name in loaded} <= sys.stdlib_module_names | {"__main__"}
