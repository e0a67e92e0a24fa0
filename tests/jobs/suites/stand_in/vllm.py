"""Stands in for vLLM: expands prompts as vLLM does, answers as the variable STAND_IN says, and
writes down what it received."""

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import safe_open
from tokenizers import Tokenizer

from sppruner.spec import PruneSpec

__version__ = "0"
settings_of_test = json.loads(os.environ["STAND_IN"])


def note(**what: object) -> None:
    with open(settings_of_test["notes"], "a") as notes:
        notes.write(json.dumps(what) + "\n")


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, model: str, **settings: Any) -> None:
        names = [
            *("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "HF_HUB_OFFLINE"),
            *(name for name in ("VLLM_PLUGINS",) if name in os.environ),
        ]
        child = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL).pid
        with safe_open(f"{model}/model.safetensors", "np") as weights:
            note(
                settings=settings,
                environment={name: os.environ[name] for name in names},
                weights=list(weights.keys()),
                folder=str(Path(model).parent),
                pids=[os.getpid(), child],
            )
        self.config = json.loads(Path(model, "config.json").read_text())
        self.tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
        self.llm_engine = self.renderer = self
        self.waiting: list[SimpleNamespace] = []
        print("loaded, printed to stdout by vLLM")
        atexit.register(note, exited=True)

    def read(self, prompt: dict[str, Any]) -> list[int]:
        visual, tokens = self.config["image_token_index"], self.config["image_seq_length"]
        if "mm_processor_kwargs" in prompt:
            prune = prompt["mm_processor_kwargs"]["prune"]
            tokens = PruneSpec.from_dict(prune).budget.count(tokens)
        ids: list[int] = []
        for token in self.tokenizer.encode(prompt["prompt"]).ids:
            ids += [token] * (tokens if token == visual else 1)
        return [*ids, 0] if settings_of_test.get("fault") == "one more" else ids

    def generate(
        self, prompts: list[dict[str, Any]], params: Any, use_tqdm: bool
    ) -> list[SimpleNamespace]:
        os.write(1, b"printed by a child process of vLLM\n")
        if settings_of_test.get("fault") == "dies":
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        if settings_of_test.get("fault") == "dies later":
            threading.Timer(0.1, os._exit, (4,)).start()
        assert (params.temperature, params.ignore_eos) == (0.0, True)
        note(batch=[prompt["multi_modal_data"]["image"].tobytes().hex() for prompt in prompts])
        answers = settings_of_test["answers"] or [[7] * params.max_tokens] * len(prompts)
        if settings_of_test.get("fault") == "ends early":
            answers = [answer[:-1] for answer in answers]
        ids = [self.read(prompt) for prompt in prompts]
        if settings_of_test.get("fault") == "other words":
            ids[1][-1] += 1
        time.sleep(0.01)
        return [
            SimpleNamespace(prompt_token_ids=one, outputs=[SimpleNamespace(token_ids=answer)])
            for one, answer in zip(ids, answers, strict=True)
        ]

    def render_cmpl(self, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [prompt | {"rendered": True} for prompt in prompts]

    def add_request(self, name: str, prompt: dict[str, Any], params: Any) -> None:
        assert prompt["rendered"]
        note(single=prompt["multi_modal_data"]["image"].tobytes().hex())
        self.waiting = [SimpleNamespace(outputs=[SimpleNamespace(token_ids=())])]
        self.waiting += [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * n)])
            for n in range(1, params.max_tokens + 1)
        ]

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[SimpleNamespace]:
        time.sleep(0.05 if len(self.waiting) > 8 else 0.01)
        return [self.waiting.pop(0)]
