"""vLLM as its users call it, with nothing of this project but the plugin, which it finds itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sppruner.engine import open_engine
from sppruner.models.loading import resolve_model
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.sppruner.integrations.vllm.requests import questions

pytestmark = pytest.mark.timeout(600)

_RUN = """
import json, sys
from vllm import LLM, SamplingParams
from PIL import Image

if __name__ == "__main__":
    asked = json.load(open(sys.argv[1]))
    llm = LLM(asked["model"], dtype="float32", enforce_eager=True, max_model_len=1024,
              generation_config="vllm", **asked["options"])
    params = SamplingParams(temperature=0, max_tokens=12)
    images = [Image.open(path) for path in asked["images"]]
    said = {}
    for name, kwargs in asked["kwargs"].items():
        prompts = [
            {"prompt": text, "multi_modal_data": {"image": image},
             **({"mm_processor_kwargs": kwargs} if kwargs is not None else {})}
            for text, image in zip(asked["texts"], images)
        ]
        said[name] = [
            [list(out.outputs[0].token_ids), len(out.prompt_token_ids)]
            for out in llm.generate(prompts, params)
        ]
    if asked["chat"] is not None:
        turns = [
            [{"role": "user", "content": [
                {"type": "image_pil", "image_pil": image}, {"type": "text", "text": text}]}]
            for text, image in zip(asked["questions"], images)
        ]
        outs = llm.chat(turns, params, mm_processor_kwargs=asked["chat"])
        said["chat"] = [[list(o.outputs[0].token_ids), len(o.prompt_token_ids)] for o in outs]
    print("SAID" + json.dumps(said))
"""


def vllm_says(
    folder: Path,
    kwargs: dict[str, Any],
    *,
    plugins: str | None = None,
    chat: Any = None,
    **options: Any,
) -> Any:
    """What `LLM.generate` answers to eight questions about scenes, under each of `kwargs`."""
    from sppruner.prompts import chat_text

    requests = questions(8)
    processor = open_engine("tiny-qwen")._processor
    for number, request in enumerate(requests):
        request.images[0].save(folder / f"{number}.png")
    asked = {
        "model": resolve_model("tiny-qwen").path,
        "images": [str(folder / f"{number}.png") for number in range(len(requests))],
        "texts": [chat_text(processor, r.conversation, r.images) for r in requests],
        "questions": [request.prompt for request in requests],
        "kwargs": kwargs,
        "chat": chat,
        "options": options,
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    (folder / "run.py").write_text(_RUN)
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    ended = subprocess.run(
        [sys.executable, "run.py", "asked.json"],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("SAID"))
    return json.loads(line.removeprefix("SAID"))


SPP = PruneSpec(method="sppruner", budget=Budget(ratio=0.222), options={"relevance": "none"})


@pytest.mark.slow
def test_a_dense_request_has_the_tokens_of_vllm_without_the_plugin(tmp_path: Path) -> None:
    without = vllm_says(tmp_path, {"nothing": None}, plugins="none_of_them")
    asked = {
        "nothing": None,
        "dense": {"prune": DENSE.to_dict()},
        "pruned": {"prune": SPP.to_dict()},
    }
    found = vllm_says(tmp_path, asked, chat={"prune": SPP.to_dict()})
    assert found["nothing"] == found["dense"] == without["nothing"]
    # And a pruned one, by either call, those of this project's engine.
    engine = open_engine("tiny-qwen", dtype="float32")
    results = engine.run(questions(8, SPP))
    assert [length for _, length in found["pruned"]] == [r.prompt_tokens for r in results]
    assert found["chat"] == found["pruned"]
    assert found["pruned"] != found["dense"]
    decode = engine._processor.tokenizer.decode
    texts = [decode(ids, skip_special_tokens=True).strip() for ids, _ in found["pruned"]]
    assert texts == [result.text for result in results]


@pytest.mark.slow
def test_a_default_that_the_model_cannot_run_stops_vllm_at_its_start(tmp_path: Path) -> None:
    default = {"prune": PruneSpec(method="fastv", budget=Budget(ratio=0.5)).to_dict()}
    with pytest.raises(AssertionError, match="inside the decoder"):
        vllm_says(tmp_path, {"nothing": None}, mm_processor_kwargs=default)
