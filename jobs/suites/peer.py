"""vLLM as a peer of our engines: the same weights, images and prompts in a separate process.

vLLM is never a dependency: `--peer` names the interpreter of an environment with vLLM's CPU build,
which runs `peer_worker.py`. Both sides decode greedily in the model's precision with equally many
threads. The peer encodes and prefills every image in every pass, as our engines do when they are
timed: its prefix cache and its cache of processed images are off.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from cluster.errors import FleetUnavailable, UsageError
from jobs.suites.passes import EngineTiming
from jobs.suites.peer_inputs import PeerInputs, written_inputs
from sppruner.engine import Request
from sppruner.models.loading import LoadedModel
from sppruner.spec import DENSE, PruneSpec

NAME: Final = "vLLM dense"
_WORKER: Final = Path(__file__).with_name("peer_worker.py")
# vLLM's processes poll for work for a second before they sleep; nothing is timed until then.
_SETTLED_SECONDS: Final = 1.5
_EXIT_SECONDS: Final = 30
_LOG_LINES: Final = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAnswers:
    """Answers to all requests except the one that is timed singly."""

    seconds: float
    """From the first submission to the last answer."""
    tokens: list[list[int]]
    """Generated token ids by request."""
    prompt_tokens: list[int]
    """Tokens of each prompt as it entered the decoder."""


class Peer:
    """A worker process that has loaded the model.

    about: its version and cores. The last request is the one that is timed singly.
    """

    def __init__(
        self,
        python: Path,
        worker: subprocess.Popen[str],
        log: Path,
        *,
        inputs: PeerInputs,
    ) -> None:
        self._python, self._worker, self._log = python, worker, log
        self._prompts, self._new_tokens = inputs.prompts, inputs.new_tokens
        cores = " ".join(_cores())
        self.about: str = f"{self._reply()['loaded']} (a thread on each of the cores {cores})"

    def answer(self, spec: PruneSpec = DENSE, *, first: int | None = None) -> PeerAnswers:
        """Answers all requests but the last. first: only the first so many. Raises FleetUnavailable
        if the peer died, densely read other prompts than ours, or generated another number of
        tokens: its time is no measurement."""
        together = list(range(len(self._prompts) - 1))[:first]
        prune = None if spec.is_dense else spec.to_dict()
        reply = self._call({"answer": together, "prune": prune})
        for number, read, answer in zip(together, reply["prompts"], reply["answers"], strict=True):
            ours = self._prompts[number]
            if prune is None and read != ours:
                raise FleetUnavailable(
                    f"{NAME}, request {number}: it read {len(read)} prompt tokens, and we read "
                    f"{len(ours)}{' others' if len(read) == len(ours) else ''}: leave out --peer, "
                    "or give the interpreter of another version of vLLM"
                )
            if len(answer) != self._new_tokens:
                raise FleetUnavailable(
                    f"{NAME}, request {number}: {len(answer)} tokens generated instead of "
                    f"{self._new_tokens}: leave out --peer, or give the interpreter of another "
                    "version of vLLM"
                )
        time.sleep(_SETTLED_SECONDS)
        return PeerAnswers(
            seconds=reply["seconds"],
            tokens=reply["answers"],
            prompt_tokens=[len(read) for read in reply["prompts"]],
        )

    def time_round(self) -> EngineTiming:
        """Times one round. Raises as `answer` does."""
        *together, number = range(len(self._prompts))
        single = self._call({"single": number})
        rest = single["last_token"] - single["first_token"]
        return EngineTiming(
            first_token=single["first_token"],
            inter_token=rest / (self._new_tokens - 1),
            images_per_second=len(together) / self.answer().seconds,
        )

    def _call(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._worker.stdin is not None
        # If the worker died, `_reply` raises with its log, which says more than the broken pipe.
        with suppress(BrokenPipeError):
            print(json.dumps(command), file=self._worker.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._worker.stdout is not None
        line = self._worker.stdout.readline()
        if not line:
            status = self._worker.wait()
            last = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            raise FleetUnavailable(
                f"--peer {self._python}: it ended with status {status}. Check that this "
                "interpreter can `import vllm` and has memory for the model. The end of its log:\n"
                + "\n".join(last)
            )
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def open_peer(
    python: Path, loaded: LoadedModel, requests: Sequence[Request], *, slots: int
) -> Iterator[Peer]:
    """A peer that is ready to answer `requests`, the last of which is timed singly.

    slots: most requests side by side. Raises UsageError if `python` is no interpreter or the model
    is on a GPU, FleetUnavailable if the interpreter cannot load the model.
    """
    if loaded.model.device.type != "cpu":
        raise UsageError("--peer is for vLLM's CPU build: leave it out on a machine with a GPU")
    with (
        written_inputs(loaded, requests, slots=slots) as inputs,
        start_peer(python, inputs) as peer,
    ):
        yield peer


@contextmanager
def start_peer(python: Path, inputs: PeerInputs, *, plugin: bool = False) -> Iterator[Peer]:
    """A peer that is ready to answer what was written. plugin: whether it loads plugins, and so can
    prune; without, vLLM is as its own package has it. Raises as `open_peer` does."""
    environment = peer_environment(python)
    if not plugin:
        environment["VLLM_PLUGINS"] = ""
    with _start_worker(python, inputs.folder, environment) as (worker, log):
        yield Peer(python, worker, log, inputs=inputs)


@contextmanager
def _start_worker(
    python: Path, folder: Path, environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The worker's process and the file of its stderr."""
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".log", delete=False) as errors:
        log = Path(errors.name)
        try:
            worker = subprocess.Popen(
                # Isolated: neither this project nor its environment is on the worker's path.
                [python.absolute(), "-I", _WORKER, folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise UsageError(
                f"--peer {python}: {error.strerror}: give the Python of an environment with vLLM"
            ) from error
    assert worker.stdin is not None
    with worker:
        exit_seconds = 0
        try:
            yield worker, log
            exit_seconds = _EXIT_SECONDS
        finally:
            # Closing flushes what a dead worker did not read.
            with suppress(BrokenPipeError):
                worker.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                worker.wait(exit_seconds)
            # vLLM's child processes outlive a killed parent.
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)


def peer_environment(python: Path) -> dict[str, str]:
    """Variables of processes with vLLM: as many threads as torch has here, each on its own core,
    and no network traffic."""
    variables = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(_cores()),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    # vLLM installs this library and warns that it is slower without it.
    openmp = python.absolute().parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        variables["LD_PRELOAD"] = f"{os.environ.get('LD_PRELOAD', '')} {openmp}".strip()
        # Or a process that has computed starts all others on its first core, a Ray cluster too.
        variables["KMP_AFFINITY"] = "none"
    return os.environ | variables


def _cores() -> list[str]:
    return [str(core) for core in sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]]
