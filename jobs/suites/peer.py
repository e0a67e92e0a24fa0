"""vLLM as a peer of suite `engine`: the same weights, images and prompts in a separate process.

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
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors.torch import load_file, save_file

from cluster.errors import FleetUnavailable, UsageError
from jobs.suites.passes import EngineTiming
from sppruner.cost.decoder_cost import DecoderCost
from sppruner.engine import Request
from sppruner.models.loading import LoadedModel
from sppruner.prompts import build_inputs

NAME: Final = "vLLM dense"
_WORKER: Final = Path(__file__).with_name("peer_worker.py")
_BLOCK: Final = 128  # tokens per block of vLLM's KV cache on a CPU
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


class Peer:
    """A worker process that has loaded the model.

    about: its version and cores. prompts: prompt token ids of each request as our engine builds
    them; the last request is the one that is timed singly.
    """

    def __init__(
        self,
        python: Path,
        worker: subprocess.Popen[str],
        log: Path,
        *,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
    ) -> None:
        self._python, self._worker, self._log = python, worker, log
        self._prompts, self._new_tokens = prompts, new_tokens
        cores = " ".join(_cores())
        self.about: str = f"{self._reply()['loaded']} (a thread on each of the cores {cores})"

    def answer(self) -> PeerAnswers:
        """Answers all requests but the last. Raises FleetUnavailable if the peer died, read other
        prompts than ours or generated another number of tokens: its time is no measurement."""
        *together, _ = range(len(self._prompts))
        reply = self._call({"answer": together})
        for number, read, answer in zip(together, reply["prompts"], reply["answers"], strict=True):
            ours = self._prompts[number]
            if read != ours:
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
        return PeerAnswers(seconds=reply["seconds"], tokens=reply["answers"])

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
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        folder = Path(name)
        prompts = _write_inputs(folder, loaded, requests, slots)
        with _start_worker(python, folder) as (worker, log):
            new_tokens = requests[0].generation.max_new_tokens
            yield Peer(python, worker, log, prompts=prompts, new_tokens=new_tokens)


def _write_inputs(
    folder: Path, loaded: LoadedModel, requests: Sequence[Request], slots: int
) -> list[list[int]]:
    """Writes the worker's input; returns the prompt token ids of each request in our engines."""
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # as `load_model` does
    loaded.model.save_pretrained(folder / "model")
    loaded.processor.save_pretrained(folder / "model")
    # vLLM builds a family's video processor from this separate file.
    loaded.processor.image_processor.save_pretrained(folder / "model")
    for weights in (folder / "model").glob("*.safetensors"):
        _rename_tower_weights(weights)
    prompts, prepared = [], []
    for number, request in enumerate(requests):
        (image,) = request.images
        inputs = build_inputs(loaded.processor, [request.prompt], [image])
        prompts.append(inputs["input_ids"][0].tolist())
        image.save(folder / f"{number}.png")
        content = [{"type": "image"}, {"type": "text", "text": request.prompt}]
        prompt = loaded.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        prepared.append({"prompt": prompt, "image": f"{number}.png"})
    new_tokens = requests[0].generation.max_new_tokens
    longest = max(map(len, prompts)) + new_tokens
    written = {
        "settings": _vllm_settings(
            loaded.model.config, loaded.model.dtype, -(-longest // _BLOCK) * _BLOCK, slots
        ),
        "new_tokens": new_tokens,
        "requests": prepared,
    }
    (folder / "requests.json").write_text(json.dumps(written))
    return prompts


def _vllm_settings(config: Any, dtype: torch.dtype, context: int, slots: int) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`. context: most tokens of a prompt and its answer."""
    decoder = DecoderCost.from_config(config.get_text_config(), bytes_per_value=dtype.itemsize)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        # Compiled it took the same CPU time on a pass of `llava` and started 40 s later.
        "enforce_eager": True,
        "max_model_len": context,
        "max_num_seqs": slots,
        # One slot more: vLLM reserves a block.
        "kv_cache_memory_bytes": decoder.kv_bytes([context] * decoder.layers, 1) * (slots + 1),
        # With both off, every image gets a new id, so no vision features are reused.
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "generation_config": "vllm",
        "seed": 0,
    }


def _rename_tower_weights(weights: Path) -> None:
    """Renames a CLIP tower's weights: transformers 5 saves shorter names than released checkpoints
    have, and vLLM knows only those of the released ones."""
    short, long = "vision_tower.", "vision_tower.vision_model."
    tensors = load_file(weights)
    named = {
        name.replace(short, long, 1)
        if name.startswith(short) and not name.startswith(long)
        else name: tensor
        for name, tensor in tensors.items()
    }
    if named.keys() != tensors.keys():
        save_file(named, weights, metadata={"format": "pt"})


@contextmanager
def _start_worker(python: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The worker's process and the file of its stderr."""
    log = folder / "log.txt"
    with log.open("w") as errors:
        try:
            worker = subprocess.Popen(
                # Isolated: neither this project nor its environment is on the worker's path.
                [python.absolute(), "-I", _WORKER, folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=folder,
                env=_environment(python),
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


def _environment(python: Path) -> dict[str, str]:
    """As many threads as torch has here, each on its own core, and no network traffic."""
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
    return os.environ | variables


def _cores() -> list[str]:
    return [str(core) for core in sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]]
