"""A batch job that keeps a fleet's replicas busy while online requests are timed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Final

import ray

from cluster.errors import RunError, UsageError
from cluster.output.run_output import RunOutput
from cluster.serving.fleet import Fleet

_START_SECONDS: Final = 300.0
_END_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.2
_LOG_BYTES: Final = 2000


class BatchJob:
    """Context manager: runs `jobs/caption_corpus.py` as a user would, in its own process on the
    cluster and the replicas of `fleet`. On entry every replica holds rows of the job; on exit the
    job is interrupted and the replicas are empty.

    Raises RunError if the job does not start or stop in time.
    """

    def __init__(self, fleet: Fleet, corpus: str, output: str) -> None:
        self._fleet = fleet
        self._corpus = corpus
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._open = ExitStack()

    def __enter__(self) -> BatchJob:
        command = [sys.executable, "-m", "jobs.caption_corpus", "--model", self._fleet.model]
        command += ["--input", self._corpus, "--output", self._output]
        address = ray.get_runtime_context().gcs_address
        with ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                command,
                env=os.environ | {"RAY_ADDRESS": address},
                stdout=self._log,
                stderr=self._log,
            )
            stack.callback(self._stop)
            self._wait(lambda: all(self._rows_held()), _START_SECONDS, "had no rows on replicas")
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._open:
            self._stop()
            if error is None:
                self._wait(
                    lambda: not any(self._rows_held()), _END_SECONDS, "left rows on replicas"
                )

    def check(self) -> None:
        """Raises UsageError if the job has labelled every unit, RunError if it has failed."""
        assert self._process is not None
        status = self._process.poll()
        if status == 0 or self._all_committed():
            raise UsageError(
                "the batch job finished before the requests beside it: give a slower --model"
            )
        if status is not None:
            raise RunError(f"the batch job ended with status {status}: {self._read_log_tail()}")

    def _all_committed(self) -> bool:
        output = RunOutput.open(self._output)
        manifest = output.manifest()
        return manifest is not None and len(output.committed_units()) == len(manifest.units)

    def _rows_held(self) -> list[int]:
        """Unanswered batch rows of every replica."""
        return [replica.batch_rows_in_flight for replica in self._fleet.stats().replicas]

    def _wait(self, condition: Callable[[], bool], seconds: float, problem: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self._process is not None:
                self.check()
            if time.monotonic() > deadline:
                raise RunError(
                    f"the batch job {problem} after {seconds:.0f} s: {self._read_log_tail()}"
                )
            time.sleep(_POLL_SECONDS)

    def _read_log_tail(self) -> str:
        """The last bytes of the job's output."""
        assert self._log is not None
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LOG_BYTES))
        return self._log.read().decode(errors="replace")

    def _stop(self) -> None:
        """Interrupts the job: committed units stay, no further rows are sent to the replicas."""
        process, self._process = self._process, None
        if process is None:
            return
        # Not SIGINT: below a shell that put this process into the background it is ignored.
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
