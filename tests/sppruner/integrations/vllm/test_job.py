"""A labelling job driven by vLLM writes what one driven by this project's engine writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.make_corpus import make_corpus
from tests.chaos.processes import find_workers, raylets_of, send

REPOSITORY = Path(__file__).parents[4]
ROWS = 128
OWN = {"device", "attempts", "run_id", "unit_id"}
"""Columns of a row that say who answered it, and in which run."""
VLLM = ["--engine", "vllm"]
for option in ("enforce_eager=true", "max_model_len=1024", "gpu_memory_utilization=0.3"):
    VLLM += ["--engine-option", option]


def command(corpus: Path, output: Path, *options: str) -> list[str]:
    return [
        sys.executable, "jobs/caption_corpus.py", "--input", str(corpus), "--output", str(output),
        "--control-blocks", "1", *options,
    ]  # fmt: skip


def label(corpus: Path, output: Path, *options: str, code: int = 0) -> str:
    ended = subprocess.run(
        command(corpus, output, *options),
        cwd=REPOSITORY,
        env=os.environ | {"RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert ended.returncode == code, ended.stdout[-4000:]
    return ended.stdout


def rows(output: Path) -> list[dict[str, Any]]:
    """Committed rows by key, without what depends on time or on who answered."""
    found = [row for file in output.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    for row in found:
        for name in [name for name in row if "seconds" in name or name in OWN]:
            del row[name]
    return sorted(found, key=lambda row: str(row["key"]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_captions_kept_tokens_and_modelled_costs_are_equal(tmp_path: Path) -> None:
    make_corpus(kind="caption", rows=ROWS, output=str(tmp_path / "corpus"))
    label(tmp_path / "corpus", tmp_path / "ours")
    label(tmp_path / "corpus", tmp_path / "theirs", *VLLM)
    ours, theirs = rows(tmp_path / "ours"), rows(tmp_path / "theirs")
    assert len(ours) == ROWS
    # Which rows a block takes follows from the run's id, and the engine is part of that.
    both = 0
    for pair in zip(ours, theirs, strict=True):
        texts = [row.pop("control_text") for row in pair if row.pop("is_control") is not None]
        both += None not in texts
        assert None in texts or texts[0] == texts[1]
    assert both > ROWS // 4, "most rows of the two blocks are the same"
    different = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    assert not different, f"{len(different)}: {different[0]}"


@pytest.mark.slow
def test_what_vllm_cannot_run_stops_before_anything_starts(tmp_path: Path) -> None:
    make_corpus(kind="caption", rows=4, output=str(tmp_path / "corpus"))
    said = label(tmp_path / "corpus", tmp_path / "out", *VLLM, "--method", "fastv", code=2)
    assert "inside the decoder" in said
    said = label(
        tmp_path / "corpus", tmp_path / "out", *VLLM, "--engine-option", "async_scheduling=true",
        code=2,
    )  # fmt: skip
    assert "seconds" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_replica_loses_no_row(tmp_path: Path) -> None:
    """Its vLLM dies with it, and another one answers its rows."""
    rows_planned = 1000
    make_corpus(kind="caption", rows=rows_planned, output=str(tmp_path / "corpus"))
    output, log = tmp_path / "out", tmp_path / "job.log"
    with log.open("wb") as file:
        job = subprocess.Popen(
            command(tmp_path / "corpus", output, *VLLM),
            cwd=REPOSITORY,
            env=os.environ | {"RAY_ADDRESS": "local"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 300
        while not list(output.glob("*.parquet")):
            assert job.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(0.1)
        (replica,) = find_workers("replica", raylets_of(job.pid))
        assert send(replica, signal.SIGKILL)
        assert job.wait(timeout=400) == 0, log.read_text(errors="replace")[-4000:]
    finally:
        job.kill()
        job.wait()
    assert "1 replica died" in log.read_text(errors="replace")
    found = rows(output)
    assert len({row["key"] for row in found}) == len(found) == rows_planned
    assert not any(row["error_code"] for row in found)
