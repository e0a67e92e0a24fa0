"""vLLM's side of suite `engine`, run by the interpreter of an environment that has vLLM:

    python -I peer_worker.py FOLDER

FOLDER is what `jobs/suites/peer.py` wrote: a model, images, and `asked.json`. Replies, one JSON
object a line, go to what was stdout, and everything that vLLM prints to stderr. The first one says
that the model is loaded; then there is one for every line of stdin:

    {"answer": [0, 1]}    those requests at once: seconds, and the tokens of prompts and answers
    {"alone": 2}          one request: seconds to its first token, and to its last

This file imports nothing of the project, and no other of the project imports it.
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


class Worker:
    def __init__(self, folder: Path) -> None:
        # Not an import statement: type checkers of the project's own environment have no vLLM.
        vllm = importlib.import_module("vllm")
        asked = json.loads((folder / "asked.json").read_text())
        self.version: str = vllm.__version__
        self._llm = vllm.LLM(model=str(folder / "model"), **asked["settings"])
        self._sampling = {
            "temperature": 0.0,
            "max_tokens": asked["new_tokens"],
            "ignore_eos": True,
            "detokenize": True,
        }
        self._params = vllm.SamplingParams
        self._prompts = [
            {"prompt": one["prompt"], "multi_modal_data": {"image": _read(folder / one["image"])}}
            for one in asked["requests"]
        ]

    def answer(self, numbers: Sequence[int]) -> dict[str, Any]:
        prompts, params = [self._prompts[n] for n in numbers], self._params(**self._sampling)
        began = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "prompts": [list(output.prompt_token_ids) for output in outputs],
            "answers": [list(output.outputs[0].token_ids) for output in outputs],
        }

    def alone(self, number: int) -> dict[str, float]:
        """Steps the engine by hand: `generate` returns when all is said."""
        engine = self._llm.llm_engine
        began, first = time.perf_counter(), None
        (prompt,) = self._llm.renderer.render_cmpl([self._prompts[number]])
        engine.add_request("alone", prompt, self._params(**self._sampling))
        while engine.has_unfinished_requests():
            said = any(output.outputs[0].token_ids for output in engine.step())
            if said and first is None:
                first = time.perf_counter() - began
        assert first is not None
        return {"first_token": first, "last_token": time.perf_counter() - began}


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def main() -> None:
    # vLLM and its processes write to stdout as they like; replies keep a way of their own.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(said: dict[str, Any]) -> None:
        print(json.dumps(said), file=replies, flush=True)

    worker = Worker(Path(sys.argv[1]))
    reply({"loaded": f"vLLM {worker.version}"})
    for line in sys.stdin:
        command = json.loads(line)
        reply(
            worker.answer(command["answer"])
            if "answer" in command
            else worker.alone(command["alone"])
        )


# vLLM's processes import this file too.
if __name__ == "__main__":
    main()
