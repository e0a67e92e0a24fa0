"""Tokens are sampled as `generate` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from sppruner.engine.interface import SamplingParams
from sppruner.engine.sampler import Sampler, SamplingState

LOGITS = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3


def states(**generation: Any) -> list[SamplingState]:
    return [SamplingState(SamplingParams(seed=n, **generation), ids=[n, n + 1]) for n in range(5)]


def test_greedy_takes_the_best_token_that_is_not_suppressed_and_records_it() -> None:
    best = LOGITS.argmax(dim=1).tolist()
    sampled = states()
    assert Sampler(GenerationConfig(), suppressed=()).sample(LOGITS, sampled) == best
    assert [state.ids[-1] for state in sampled] == best
    suppressed = [*best[:2], 39]
    allowed = LOGITS.index_fill(1, torch.tensor(suppressed), float("-inf")).argmax(dim=1).tolist()
    assert Sampler(GenerationConfig(), suppressed=suppressed).sample(LOGITS, states()) == allowed


def test_a_models_repetition_penalty_counts_each_requests_own_tokens() -> None:
    config = GenerationConfig(repetition_penalty=1.7)
    sampled = states()
    for state, row in zip(sampled, LOGITS, strict=True):
        state.ids[:] = row.topk(3).indices.tolist()
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    expected = [
        int(penalty(torch.tensor([state.ids]), row[None].clone()).argmax())
        for state, row in zip(sampled, LOGITS, strict=True)
    ]
    assert expected != LOGITS.argmax(dim=1).tolist()
    assert Sampler(config, suppressed=()).sample(LOGITS, sampled) == expected


def test_a_seed_draws_the_same_tokens_in_any_company() -> None:
    sampler = Sampler(GenerationConfig(), suppressed=())
    together = sampler.sample(LOGITS, states(temperature=1.5, top_p=0.9))
    single = [
        sampler.sample(row[None], [state])[0]
        for row, state in zip(LOGITS, states(temperature=1.5, top_p=0.9), strict=True)
    ]
    assert together == single
    assert together != LOGITS.argmax(dim=1).tolist()


def test_top_p_never_draws_from_the_tail() -> None:
    sampler = Sampler(GenerationConfig(), suppressed=())
    nucleus = LOGITS[:1].softmax(dim=1).sort(descending=True)
    within = nucleus.indices[0, : int((nucleus.values.cumsum(1) < 0.5).sum()) + 1].tolist()
    drawn = {
        sampler.sample(
            LOGITS[:1], [SamplingState(SamplingParams(temperature=1.0, top_p=0.5, seed=n), [])]
        )[0]
        for n in range(200)
    }
    assert drawn == set(within)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_fail_their_own_request(temperature: float) -> None:
    sampler = Sampler(GenerationConfig(), suppressed=())
    expected = sampler.sample(LOGITS, states(temperature=temperature))
    broken = LOGITS.clone()
    broken[1] = float("nan")
    broken[3] = float("-inf")
    sampled = states(temperature=temperature)
    tokens = sampler.sample(broken, sampled)
    assert [state.failure is not None for state in sampled] == [False, True, False, True, False]
    assert [tokens[i] for i in (0, 2, 4)] == [expected[i] for i in (0, 2, 4)]
    assert [len(state.ids) for state in sampled] == [3, 2, 3, 2, 3]


def test_a_device_that_faults_is_no_requests_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> int:
        raise torch.AcceleratorError("the device is gone")

    monkeypatch.setattr("sppruner.engine.sampler._draw", fault)
    with pytest.raises(torch.AcceleratorError):
        Sampler(GenerationConfig(), suppressed=()).sample(LOGITS, states(temperature=1.0))
