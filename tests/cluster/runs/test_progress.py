"""The progress line: share done, speed, time left, failed rows and kept tokens."""

from __future__ import annotations

import io
import time
from typing import Any

from rich.console import Console

from cluster.controller import RunProgress
from cluster.runs import progress
from cluster.runs.progress import ProgressDisplay, format_eta, progress_line


def run_progress(**more: Any) -> RunProgress:
    values: dict[str, Any] = {
        "run_id": "r",
        "state": "running",
        "units_done": 1,
        "units_total": 4,
        "rows_done": 250,
        "rows_total": 1000,
        "rows_failed": {"image_missing": 2, "image_too_large": 1},
        "rows_per_second": 12.5,
        "eta_seconds": 60.0,
        "visual_tokens": 1000,
        "visual_tokens_kept": 222,
        "seconds": 1.0,
        "flops": 1,
        "flops_dense": 2,
        "meta": {},
    }
    return RunProgress(**(values | more))


def test_the_progress_line_has_share_speed_eta_failures_and_tokens() -> None:
    assert progress_line(run_progress()) == (
        "250/1000 rows  25.0 %  12.5 rows/s  ETA 0:01:00  failed 3  visual tokens kept 22.2 %"
    )


def test_before_the_first_commit_there_is_no_eta_and_no_token_share() -> None:
    at_start = run_progress(
        rows_done=0,
        rows_failed={},
        rows_per_second=0.0,
        eta_seconds=None,
        visual_tokens=0,
        visual_tokens_kept=0,
    )
    assert progress_line(at_start) == "0/1000 rows  0.0 %  0.0 rows/s  ETA –  failed 0"
    assert format_eta(3725.4) == "1:02:05"


def test_the_progress_line_ends_with_what_happened() -> None:
    happened = run_progress(events={"replica_died": 1})
    assert progress_line(happened).endswith("visual tokens kept 22.2 %  1 replica died")


def test_a_job_log_has_plain_lines_and_a_final_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.05)
    out = io.StringIO()
    answers = iter([None, run_progress(rows_done=10)])
    with ProgressDisplay(
        lambda: next(answers, run_progress(rows_done=1000)), Console(file=out, width=40)
    ):
        time.sleep(0.4)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("progress  10/1000 rows")
    assert lines[-1].startswith("progress  1000/1000 rows")
    assert all(each.startswith("progress") for each in lines), "a line must not be wrapped"


def test_a_terminal_shows_a_progress_bar(monkeypatch: Any) -> None:
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.05)
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=160)
    with ProgressDisplay(run_progress, terminal):
        time.sleep(0.5)
    assert "250/1000 rows" in out.getvalue()
