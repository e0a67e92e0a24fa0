"""The clock that the processes of a chaos run have."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.clock import WallClock

READ = """
import os, sys, time
print(time.time(), time.monotonic(), os.stat(sys.argv[1]).st_mtime)
"""


def test_the_date_jumps_and_nothing_else(tmp_path: Path) -> None:
    clock = WallClock(tmp_path / "clock")
    if not clock.environment:
        pytest.skip("libfaketime does not work on this machine")
    file = tmp_path / "file"
    file.touch()
    for ahead in (0, 7200, -7200):
        clock.set(ahead)
        read = subprocess.run(
            [sys.executable, "-c", READ, str(file)],
            env={**os.environ, **clock.environment}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        date, monotonic, changed = map(float, read.stdout.split())
        assert date == pytest.approx(time.time() + ahead, abs=60)
        assert monotonic == pytest.approx(time.monotonic(), abs=60)
        assert changed == pytest.approx(file.stat().st_mtime, abs=1)
    clock.close()
    assert not list(Path("/dev/shm").glob("*faketime*"))


def test_without_the_library_there_is_no_clock_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.chaos.clock.find_spec", lambda _: None)
    assert WallClock(tmp_path / "clock").environment == {}
