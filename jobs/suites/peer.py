"""vLLM as a peer of suite `engine`: the same weights, images and prompts in a process of its own.

It is never a dependency: `--peer` names the interpreter of an environment where vLLM's CPU build is
installed, which runs `peer_worker.py` there. Both sides choose greedily in float32 with as many
threads, and the peer encodes and reads every image anew, as our engines do when they are timed:
its caches of prompts and of processed images are off.
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
from jobs.suites.passes import Timed
from sppruner.cost.decoder_cost import DecoderCost
from sppruner.engine import Request
from sppruner.models.loading import LoadedModel
from sppruner.prompts import build_inputs

NAME: Final = "vLLM dense"
_WORKER: Final = Path(__file__).with_name("peer_worker.py")
_BLOCK: Final = 128  # tokens of a piece of vLLM's cache on a CPU
# Its processes look for work for a second before they sleep; nothing else is timed until then.
_SETTLED_SECONDS: Final = 1.5
_EXIT_SECONDS: Final = 30
_LOG_LINES: Final = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Of all requests but the one that is also timed alone. tokens: of each answer."""

    seconds: float
    tokens: list[list[int]]


class Peer:
    """A worker that has loaded the model. about: what it is, and what it may use. prompts: tokens
    of each request as we read it; the last request is the one that is timed alone."""

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

    def answer(self) -> Answers:
        """Raises FleetUnavailable for a peer that died, or that read other prompts than we do or
        said another number of tokens: its seconds would say nothing."""
        *together, _ = range(len(self._prompts))
        said = self._ask({"answer": together})
        for number, read, answer in zip(together, said["prompts"], said["answers"], strict=True):
            ours = self._prompts[number]
            if read != ours:
                raise FleetUnavailable(
                    f"{NAME}, request {number}: it read {len(read)} prompt tokens, and we read "
                    f"{len(ours)}{' others' if len(read) == len(ours) else ''}: leave out --peer, "
                    "or give the interpreter of another version of vLLM"
                )
            if len(answer) != self._new_tokens:
                raise FleetUnavailable(
                    f"{NAME}, request {number}: {len(answer)} tokens were said instead of "
                    f"{self._new_tokens}: leave out --peer, or give the interpreter of another "
                    "version of vLLM"
                )
        time.sleep(_SETTLED_SECONDS)
        return Answers(seconds=said["seconds"], tokens=said["answers"])

    def timed(self) -> Timed:
        """One round. Raises as `answer` does."""
        *together, number = range(len(self._prompts))
        alone = self._ask({"alone": number})
        rest = alone["last_token"] - alone["first_token"]
        return Timed(
            first_token=alone["first_token"],
            between_tokens=rest / (self._new_tokens - 1),
            images_per_second=len(together) / self.answer().seconds,
        )

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._worker.stdin is not None
        # Of a worker that died, `_reply` tells more than the broken pipe.
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
                "interpreter can `import vllm` and has memory for the model. Its last words:\n"
                + "\n".join(last)
            )
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def opened(
    python: Path, loaded: LoadedModel, requests: Sequence[Request], *, slots: int
) -> Iterator[Peer]:
    """The peer, ready to answer `requests`, of which the last is timed alone. slots: those side by
    side at most. Raises UsageError for an interpreter that is none, or a model on a GPU;
    FleetUnavailable for one that cannot load the model."""
    if loaded.model.device.type != "cpu":
        raise UsageError("--peer is for vLLM's CPU build: leave it out on a machine with a GPU")
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        folder = Path(name)
        prompts = _write(folder, loaded, requests, slots)
        with _started(python, folder) as (worker, log):
            new_tokens = requests[0].generation.max_new_tokens
            yield Peer(python, worker, log, prompts=prompts, new_tokens=new_tokens)


def _write(
    folder: Path, loaded: LoadedModel, requests: Sequence[Request], slots: int
) -> list[list[int]]:
    """What the worker reads; returns the tokens of each prompt as our engines read them."""
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # as where models are loaded
    loaded.model.save_pretrained(folder / "model")
    loaded.processor.save_pretrained(folder / "model")
    # Again, in a file of its own, from which processors for videos are made too, if there are any.
    loaded.processor.image_processor.save_pretrained(folder / "model")
    for weights in (folder / "model").glob("*.safetensors"):
        _name_as_published(weights)
    prompts, asked = [], []
    for number, request in enumerate(requests):
        (image,) = request.images
        inputs = build_inputs(loaded.processor, [request.prompt], [image])
        prompts.append(inputs["input_ids"][0].tolist())
        image.save(folder / f"{number}.png")
        content = [{"type": "image"}, {"type": "text", "text": request.prompt}]
        prompt = loaded.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        asked.append({"prompt": prompt, "image": f"{number}.png"})
    new_tokens = requests[0].generation.max_new_tokens
    longest = max(map(len, prompts)) + new_tokens
    written = {
        "settings": _settings(
            loaded.model.config, loaded.model.dtype, -(-longest // _BLOCK) * _BLOCK, slots
        ),
        "new_tokens": new_tokens,
        "requests": asked,
    }
    (folder / "asked.json").write_text(json.dumps(written))
    return prompts


def _settings(config: Any, dtype: torch.dtype, context: int, slots: int) -> dict[str, Any]:
    """Of vLLM's `LLM`. context: tokens of a prompt and its answer, at most."""
    decoder = DecoderCost.from_config(config.get_text_config(), bytes_per_value=dtype.itemsize)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        # Compiled it spent as much CPU time on a pass of `llava`, and began 40 s later.
        "enforce_eager": True,
        "max_model_len": context,
        "max_num_seqs": slots,
        # One more, as it keeps a block for itself.
        "kv_cache_memory_bytes": decoder.kv_bytes([context] * decoder.layers, 1) * (slots + 1),
        # With both of these off it gives every image a new name, which its encodings go by.
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "generation_config": "vllm",
        "seed": 0,
    }


def _name_as_published(weights: Path) -> None:
    """transformers 5 saves a CLIP tower under shorter names than those of released checkpoints,
    which are all that vLLM knows."""
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
def _started(python: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The worker's process, and what it writes to stderr."""
    log = folder / "log.txt"
    with log.open("w") as errors:
        try:
            worker = subprocess.Popen(
                # Isolated: nothing of this project, nor of its environment, is on its path.
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
        patience = 0
        try:
            yield worker, log
            patience = _EXIT_SECONDS
        finally:
            # Closing it writes what a dead worker did not take.
            with suppress(BrokenPipeError):
                worker.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                worker.wait(patience)
            # Processes that vLLM has started outlive one that is killed.
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)


def _environment(python: Path) -> dict[str, str]:
    """As many threads as torch has here, each on a core of its own; and no traffic."""
    set_here = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(_cores()),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    # vLLM installs it and warns that it is slower without.
    intel = python.absolute().parent.parent / "lib" / "libiomp5.so"
    if intel.exists():
        set_here["LD_PRELOAD"] = f"{os.environ.get('LD_PRELOAD', '')} {intel}".strip()
    return os.environ | set_here


def _cores() -> list[str]:
    return [str(core) for core in sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]]
