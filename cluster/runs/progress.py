"""The progress of a run, for people: a live bar on a terminal, a plain line every ten seconds in a
job's log.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from cluster.controller import RunProgress
from cluster.events import describe_events

_POLL_SECONDS = 1.0
_LINE_SECONDS = 10.0


def format_eta(seconds: float | None) -> str:
    """3725 → "1:02:05"; "–" while there is no speed to go by."""
    return "–" if seconds is None else str(timedelta(seconds=round(seconds)))


def progress_line(progress: RunProgress) -> str:
    """One line: rows done, speed, ETA, failed rows, visual tokens kept and what happened."""
    share = 100 * progress.rows_done / max(1, progress.rows_total)
    failed = sum(progress.rows_failed.values())
    total, kept = progress.visual_tokens, progress.visual_tokens_kept
    tokens = f"  visual tokens kept {100 * kept / total:.1f} %" if total else ""
    happened = describe_events(progress.events)
    return (
        f"{progress.rows_done}/{progress.rows_total} rows  {share:.1f} %  "
        f"{progress.rows_per_second:.1f} rows/s  ETA {format_eta(progress.eta_seconds)}  "
        f"failed {failed}{tokens}{'  ' + happened if happened else ''}"
    )


class ProgressDisplay:
    """Context manager: polls the progress in a thread and shows it.

    `poll` may return None while the progress is unknown; the display then stays as it is.
    """

    def __init__(self, poll: Callable[[], RunProgress | None], console: Console) -> None:
        self._poll = poll
        self._console = console
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> ProgressDisplay:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        if self._console.is_terminal:
            self._bar()
        else:
            self._lines()

    def _bar(self) -> None:
        columns = (BarColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task("starting", total=None)
            while not self._done.wait(_POLL_SECONDS):
                known = self._poll()
                if known is not None:
                    bar.update(
                        task,
                        total=known.rows_total,
                        completed=known.rows_done,
                        description=progress_line(known),
                    )

    def _lines(self) -> None:
        while not self._done.wait(_LINE_SECONDS):
            self._show()
        self._show()

    def _show(self) -> None:
        known = self._poll()
        if known is not None:
            self._console.print(f"progress  {progress_line(known)}", markup=False, highlight=False,
                                soft_wrap=True)  # fmt: skip
