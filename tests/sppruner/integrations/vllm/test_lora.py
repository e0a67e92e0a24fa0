"""An adapter is applied to every request: answers are those of a model that it was merged into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sppruner.engine import open_engine
from sppruner.errors import SpecError
from sppruner.integrations.vllm.engine import VllmEngine
from sppruner.spec import Budget, PruneSpec
from sppruner.tiny import TINY_MODELS
from tests.sppruner.integrations.vllm.requests import questions
from tests.sppruner.integrations.vllm.test_engine import long

RANK, ALPHA = 4, 8
MODULES = ("q_proj", "v_proj", "o_proj", "down_proj")
SPP = PruneSpec(method="sppruner", budget=Budget(ratio=0.222))


def write_adapter(base: Path, adapter: Path, merged: Path) -> None:
    """A random adapter of the decoder, and a copy of the model with it merged."""
    shutil.copytree(base, merged)
    weights = load_file(merged / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    found: dict[str, torch.Tensor] = {}
    for name in sorted(weights):
        parts = name.removesuffix(".weight").split(".")
        if "language_model" not in parts or parts[-1] not in MODULES:
            continue
        rows, columns = weights[name].shape
        a_RC = torch.randn(RANK, columns, generator=generator) / columns**0.5
        b_OR = torch.randn(rows, RANK, generator=generator) * 0.4
        weights[name] = weights[name] + ALPHA / RANK * (b_OR @ a_RC)
        place = "base_model.model." + name.removesuffix(".weight")
        found |= {f"{place}.lora_A.weight": a_RC, f"{place}.lora_B.weight": b_OR}
    assert found
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    adapter.mkdir()
    save_file(found, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": MODULES}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def test_answers_are_those_of_the_merged_model(
    tmp_path: Path, open_vllm: Callable[..., Any]
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    write_adapter(TINY_MODELS["tiny-llava"], adapter, merged)
    requests = long(questions(16, SPP), tokens=12)
    plain = [r.text for r in open_engine("tiny-llava", dtype="float32").run(requests)]
    expected = [r.text for r in open_engine(str(merged), dtype="float32").run(requests)]
    results = open_vllm("tiny-llava", lora=str(adapter)).run(requests)
    assert not [r.error_message for r in results if r.error_code]
    assert sum(a != b for a, b in zip(plain, expected, strict=True)) > 3, "it changes nothing"
    # Sums in another order end a near tie differently.
    assert sum(r.text != text for r, text in zip(results, expected, strict=True)) <= 1


def test_an_adapter_of_the_tower_is_refused(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    write_adapter(TINY_MODELS["tiny-llava"], adapter, tmp_path / "merged")
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(weights | {name: torch.zeros(4, 8)}, file)
    with pytest.raises(SpecError, match="not the decoder"):
        VllmEngine("tiny-llava", lora=str(adapter))


@pytest.mark.parametrize("config", [None, "{", "{}", '{"r": "many"}', '{"r": 1000}'])
def test_a_folder_without_an_adapter_is_refused_before_the_model_loads(
    config: str | None, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(SpecError, match="lora "):
        VllmEngine("tiny-llava", lora=str(tmp_path))
