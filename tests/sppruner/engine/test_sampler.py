"""Tokens are chosen as `generate` chooses them, and what only `generate` can do is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from sppruner.engine.interface import SamplingParams
from sppruner.engine.sampler import Sampler, SamplingState
from sppruner.errors import UnsupportedModel

LOGITS = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3


def choices(**generation: Any) -> list[SamplingState]:
    return [SamplingState(SamplingParams(seed=n, **generation), ids=[n, n + 1]) for n in range(5)]


def test_greedy_takes_the_best_that_may_be_said_and_remembers_it() -> None:
    best = LOGITS.argmax(dim=1).tolist()
    asked = choices()
    assert Sampler(GenerationConfig(), suppressed=()).sample(LOGITS, asked) == best
    assert [choice.ids[-1] for choice in asked] == best
    never = [*best[:2], 39]
    allowed = LOGITS.index_fill(1, torch.tensor(never), float("-inf")).argmax(dim=1).tolist()
    assert Sampler(GenerationConfig(), suppressed=never).sample(LOGITS, choices()) == allowed


def test_a_models_repetition_penalty_counts_each_requests_own_tokens() -> None:
    config = GenerationConfig(repetition_penalty=1.7)
    asked = choices()
    for choice, row in zip(asked, LOGITS, strict=True):
        choice.ids[:] = row.topk(3).indices.tolist()
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    expected = [
        int(penalty(torch.tensor([choice.ids]), row[None].clone()).argmax())
        for choice, row in zip(asked, LOGITS, strict=True)
    ]
    assert expected != LOGITS.argmax(dim=1).tolist()
    assert Sampler(config, suppressed=()).sample(LOGITS, asked) == expected


def test_a_seed_draws_the_same_tokens_in_any_company() -> None:
    chooser = Sampler(GenerationConfig(), suppressed=())
    together = chooser.sample(LOGITS, choices(temperature=1.5, top_p=0.9))
    alone = [
        chooser.sample(row[None], [choice])[0]
        for row, choice in zip(LOGITS, choices(temperature=1.5, top_p=0.9), strict=True)
    ]
    assert together == alone
    assert together != LOGITS.argmax(dim=1).tolist()


def test_top_p_never_draws_from_the_tail() -> None:
    chooser = Sampler(GenerationConfig(), suppressed=())
    head = LOGITS[:1].softmax(dim=1).sort(descending=True)
    within = head.indices[0, : int((head.values.cumsum(1) < 0.5).sum()) + 1].tolist()
    drawn = {
        chooser.sample(
            LOGITS[:1], [SamplingState(SamplingParams(temperature=1.0, top_p=0.5, seed=n), [])]
        )[0]
        for n in range(200)
    }
    assert drawn == set(within)


@pytest.mark.parametrize(
    "asks", [{"no_repeat_ngram_size": 2}, {"bad_words_ids": [[1]]}, {"min_new_tokens": 3}]
)
def test_a_model_that_asks_for_what_is_not_done_is_refused_by_name(asks: dict[str, Any]) -> None:
    (name,) = asks
    with pytest.raises(UnsupportedModel, match=f"{name}=.*BatchEngine"):
        Sampler(GenerationConfig(**asks), suppressed=())
