"""vLLM's side of suites `engine` and `peers`, run by the interpreter of an environment with vLLM:

    python -I peer_worker.py FOLDER

FOLDER is written by `jobs/suites/peer_inputs.py`: a model, images and `requests.json`. Replies go
to the original stdout, one JSON object per line; everything that vLLM prints goes to stderr. The
first reply says that the model is loaded; then each line of stdin gets one:

    {"answer": [0, 1], "prune": null}    these requests at once, under this spec of the plugin:
                                         seconds, token ids of prompts and answers
    {"single": 2}                        one request: seconds to its first token and to its last

This file imports nothing from the project, and nothing in the project imports it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


class PeerWorker:
    """The loaded model and its prepared prompts."""

    def __init__(self, folder: Path) -> None:
        # Not an import statement: type checkers of the project's own environment have no vLLM.
        vllm = importlib.import_module("vllm")
        prepared = json.loads((folder / "requests.json").read_text())
        self.version: str = vllm.__version__
        self._llm = vllm.LLM(model=str(folder / "model"), **prepared["settings"])
        self._sampling = {
            "temperature": 0.0,
            "max_tokens": prepared["new_tokens"],
            "ignore_eos": True,
            "detokenize": True,
        }
        self._params = vllm.SamplingParams
        self._folder, self._requests = folder, prepared["requests"]

    def answer(self, numbers: Sequence[int], prune: dict[str, Any] | None) -> dict[str, Any]:
        prompts = [self._prompt(number, prune) for number in numbers]
        params = self._params(**self._sampling)
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "prompts": [list(output.prompt_token_ids) for output in outputs],
            "answers": [list(output.outputs[0].token_ids) for output in outputs],
        }

    def time_single(self, number: int) -> dict[str, float]:
        """Steps the engine itself: `generate` returns only after the last token."""
        engine = self._llm.llm_engine
        asked = self._prompt(number)
        started, first = time.perf_counter(), None
        (prompt,) = self._llm.renderer.render_cmpl([asked])
        engine.add_request("single", prompt, self._params(**self._sampling))
        while engine.has_unfinished_requests():
            generated = any(output.outputs[0].token_ids for output in engine.step())
            if generated and first is None:
                first = time.perf_counter() - started
        assert first is not None
        return {"first_token": first, "last_token": time.perf_counter() - started}

    def _prompt(self, number: int, prune: dict[str, Any] | None = None) -> dict[str, Any]:
        request = self._requests[number]
        prompt = {
            "prompt": request["prompt"],
            "multi_modal_data": {"image": _read(self._folder / request["image"])},
        }
        if prune is not None:
            asked = {"prune": prune, "prune_instruction": request["asked"]}
            prompt["mm_processor_kwargs"] = asked
        return prompt


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def main() -> None:
    # vLLM and its child processes print to stdout; replies use a duplicate of it.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    worker = PeerWorker(Path(sys.argv[1]))
    reply({"loaded": f"vLLM {worker.version}"})
    for line in sys.stdin:
        command = json.loads(line)
        reply(
            worker.answer(command["answer"], command["prune"])
            if "answer" in command
            else worker.time_single(command["single"])
        )


# vLLM's child processes import this file too.
if __name__ == "__main__":
    main()
