"""Requests share vLLM's caches exactly where they would keep the same tokens of the same image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

IMAGE = Image.effect_noise((96, 96), 60).convert("RGB")


@pytest.fixture
def key(open_vllm: Callable[..., Any]) -> Callable[..., str]:
    engine = open_vllm("tiny-llava")
    tokenizer = engine._processor.tokenizer

    def of(prune: Any = None, question: str | None = None, image: Image.Image = IMAGE) -> str:
        kwargs: dict[str, Any] = {} if prune is None else {"prune": prune}
        if question is not None:
            kwargs["prune_instruction"] = question
        prompt = {
            "prompt_token_ids": tokenizer("<image> what is it ?", add_special_tokens=False)[
                "input_ids"
            ],
            "multi_modal_data": {"image": [image]},
            "mm_processor_kwargs": kwargs,
        }
        (rendered,) = engine._vllm.renderer.render_cmpl([prompt])
        (found,) = rendered["mm_hashes"]["image"]
        return str(found)

    return of


GUIDED = {"method": "cdpruner", "budget": {"ratio": 0.2}}
BLIND = {"method": "topk", "budget": {"ratio": 0.2}}


def test_a_question_counts_only_where_it_selects(key: Callable[..., str]) -> None:
    assert key(GUIDED, "the red disc") != key(GUIDED, "the blue sign")
    assert key(GUIDED, "the red disc") == key(GUIDED, "Is it a RED disc?")
    assert key(BLIND, "the red disc") == key(BLIND, "the blue sign")


def test_one_spec_has_one_form(key: Callable[..., str]) -> None:
    again = {"budget": {"ratio": 0.2}, "method": "topk", "positions": "keep"}
    assert key(BLIND) == key(again)
    assert key({"method": "topk", "budget": {"ratio": 1}}) == key(
        {"method": "topk", "budget": {"ratio": 1.0}}
    )
    assert key(BLIND) != key({**BLIND, "positions": "renumber"})
    assert key(BLIND) != key({"method": "topk", "budget": {"ratio": 0.3}})


def test_a_dense_request_has_the_hash_of_one_that_says_nothing(key: Callable[..., str]) -> None:
    assert key({"method": "none"}, "what?") == key()
    assert key({"method": "none"}) != key(BLIND)


def test_another_image_has_another_hash(key: Callable[..., str]) -> None:
    assert key(BLIND) != key(BLIND, image=IMAGE.rotate(90))
