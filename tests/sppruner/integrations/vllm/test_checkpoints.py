"""What a checkpoint's generation config says of every answer holds in vLLM too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sppruner.engine import open_engine
from sppruner.errors import UnsupportedModel
from sppruner.integrations.vllm.engine import VllmEngine
from sppruner.models.loading import load_processor, resolve_model
from sppruner.spec import Budget, PruneSpec
from sppruner.tiny import TINY_MODELS
from tests.sppruner.integrations.vllm.requests import facts, questions
from tests.sppruner.integrations.vllm.test_engine import long

SPP = PruneSpec(method="sppruner", budget=Budget(ratio=0.222))


def checkpoint(folder: Path, model: str, **settings: Any) -> Path:
    """A copy of the model whose generation config has these settings besides its own."""
    shutil.copytree(TINY_MODELS[model], folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def _tokenizer(model: str) -> Any:
    return load_processor(resolve_model(model)).tokenizer


def _word(model: str, token: int) -> str:
    return str(_tokenizer(model).decode([token]))


@pytest.mark.parametrize("model", ["tiny-llava", "tiny-qwen"])
@pytest.mark.parametrize("rule", ["ends", "never ends", "penalty", "suppressed"])
def test_it_answers_as_the_engine(
    model: str, rule: str, tmp_path: Path, open_vllm: Callable[..., Any]
) -> None:
    requests = long(questions(12, SPP))
    plain = open_engine(model, dtype="float32").run(requests)
    own = json.loads((TINY_MODELS[model] / "generation_config.json").read_text())["eos_token_id"]
    said = _tokenizer(model)(str(plain[0].text), add_special_tokens=False)["input_ids"][-1]
    settings: dict[str, dict[str, Any]] = {
        "ends": {"eos_token_id": [own, said]},
        "never ends": {"eos_token_id": [said]},
        "penalty": {"repetition_penalty": 1.8},
        "suppressed": {"suppress_tokens": [said]},
    }
    folder = str(checkpoint(tmp_path / "model", model, **settings[rule]))
    expected = open_engine(folder, dtype="float32").run(requests)
    assert [facts(r) for r in expected] != [facts(r) for r in plain], "the rule changes nothing"
    found = open_vllm(folder).run(requests)
    if rule in ("ends", "never ends"):
        # A word that ends answers is part of the text for `generate` alone; end tokens are special.
        assert "stop" in {r.finish_reason for r in expected}
        assert any(str(r.text).endswith(_word(model, said)) for r in expected)
        expected, found = (
            [replace(r, text=str(r.text).removesuffix(_word(model, said)).strip()) for r in results]
            for results in (expected, found)
        )
    assert [facts(r) for r in found] == [facts(r) for r in expected]


def test_what_only_generate_can_do_is_refused_at_start(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "tiny-llava", no_repeat_ngram_size=2)
    with pytest.raises(UnsupportedModel, match="no_repeat_ngram_size"):
        VllmEngine(str(folder))
