"""Ray Data LLM labels a corpus, for suite `peers`; run by the interpreter of an environment with
vLLM and `ray[data]`:

    python -I ray_data_llm.py SETTINGS.json

Reads Parquet with images and keys, writes Parquet, and then to the file `result`: `seconds` from
the first request's arrival at the engine to the last file, and of every row its key, its prompt's
and its answer's tokens. Reading that happens while the engine loads is not in the seconds.

This file imports nothing from the project, and nothing in the project imports it.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig


def find_moved_module() -> None:
    """Ray's extra `llm` pins an older vLLM, which had this module in another place; newer ones are
    told here. Runs in every worker."""
    from importlib.abc import Loader, MetaPathFinder
    from importlib.machinery import ModuleSpec

    class Moved(MetaPathFinder, Loader):
        def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
            return ModuleSpec(name, self) if name == "vllm.entrypoints.chat_utils" else None

        def create_module(self, spec: ModuleSpec) -> Any:
            import vllm.renderers.chat_utils as moved

            return moved

        def exec_module(self, module: Any) -> None:
            pass

    sys.meta_path.append(Moved())


def label(settings: dict[str, Any]) -> None:
    slots, prune = settings["slots"], settings["prune"]
    # Five stages of one CPU each; what runs at the same time is bounded by threads, not by this.
    ray.init(
        address="local",
        num_cpus=8,
        runtime_env={"worker_process_setup_hook": find_moved_module},
    )
    config = vLLMEngineProcessorConfig(
        model_source=settings["model"],
        engine_kwargs=settings["engine"],
        batch_size=slots,
        concurrency=1,
        log_engine_metrics=False,
        prepare_multimodal_stage={"enabled": True, "chat_template_content_format": "openai"},
        tokenize_stage={"enabled": False},
        detokenize_stage={"enabled": False},
        **({} if settings["gpu"] else {"placement_group_config": {"bundles": [{"CPU": 1}]}}),
    )

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        url = "data:image/png;base64," + base64.b64encode(row["image"]["bytes"]).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": settings["prompt"]},
        ]
        asked: dict[str, Any] = {
            "key": row["key"],
            "messages": [{"role": "user", "content": parts}],
            "sampling_params": {
                "temperature": 0.0,
                "max_tokens": settings["new_tokens"],
                "ignore_eos": True,
            },
        }
        if prune is not None:
            asked["mm_processor_kwargs"] = {
                "prune": prune,
                "prune_instruction": settings["prompt"],
            }
        return asked

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "key": row["key"],
            "text": row["generated_text"],
            "prompt_tokens": row["num_input_tokens"],
            "tokens": row["num_generated_tokens"],
            "arrival": row["metrics"]["arrival_time"],
        }

    processor = build_processor(config, preprocess=ask, postprocess=keep)
    processor(ray.data.read_parquet(settings["corpus"])).write_parquet(settings["output"])


def measure(output: Path) -> dict[str, Any]:
    files = sorted(output.glob("**/*.parquet"))
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    arrival = min(row["arrival"] for row in rows)
    return {
        "seconds": max(file.stat().st_mtime for file in files) - arrival,
        "keys": [row["key"] for row in rows],
        "prompt_tokens": [row["prompt_tokens"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
    }


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    label(settings)
    Path(settings["result"]).write_text(json.dumps(measure(Path(settings["output"]))))


if __name__ == "__main__":
    main()
