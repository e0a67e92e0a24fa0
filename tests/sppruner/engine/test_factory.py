"""A model is opened in the continuous engine where that can run it, else in the static one."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration, MistralConfig

from sppruner.engine import BatchEngine, ContinuousEngine, Request, SamplingParams, open_engine
from sppruner.errors import UnsupportedModel
from sppruner.models.loading import EMBEDDED, LoadedModel, load_model
from sppruner.spec import Budget, PruneSpec
from tests.sppruner.engine.requests import drawn

HALF = PruneSpec(method="sppruner", budget=Budget(ratio=0.5))


@pytest.fixture
def embedded() -> LoadedModel:
    return load_model(EMBEDDED)


def windowed(embedded: LoadedModel, folder: Path) -> str:
    """The embedded model with Mistral's decoder and a sliding window of 40 tokens."""
    model, config = embedded.model, embedded.model.config
    text = {k: v for k, v in config.text_config.to_dict().items() if k != "model_type"}
    config.text_config = MistralConfig(**text | {"sliding_window": 40})
    other = LlavaForConditionalGeneration(config)
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    other.save_pretrained(folder)
    embedded.processor.save_pretrained(folder)
    return str(folder)


def test_the_embedded_model_is_batched_continuously(embedded: LoadedModel) -> None:
    engine = open_engine(embedded, slots=2)
    assert isinstance(engine, ContinuousEngine)
    assert engine.slots == 2
    engine.close()


def test_a_decoder_with_windows_is_answered_in_static_batches(
    embedded: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = open_engine(windowed(embedded, tmp_path), slots=2)
    assert isinstance(engine, BatchEngine)
    assert "windows" in caplog.text
    image = drawn(random.Random(0))
    request = Request(id="1", prompt="describe the image .", images=(image,), spec=HALF)
    result = engine.run([replace(request, generation=SamplingParams(max_new_tokens=4))])[0]
    assert result.error_code is None
    assert result.visual_tokens_kept * 2 == result.visual_tokens


def test_an_unsupported_generation_config_is_left_to_generate(embedded: LoadedModel) -> None:
    embedded.model.generation_config.no_repeat_ngram_size = 2
    engine = open_engine(embedded, slots=64)
    assert isinstance(engine, BatchEngine)
    assert engine.slots == 16


def test_a_model_that_no_engine_can_run_is_refused(embedded: LoadedModel) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_attention_heads=1, **sizes))
    with pytest.raises(UnsupportedModel, match="llama"):
        open_engine(replace(embedded, model=text))
