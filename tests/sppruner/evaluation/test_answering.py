"""Answers and fidelity on the embedded model, against the engine and a plain forward pass.

Shapes: A tokens of one answer, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sppruner.engine import BatchEngine, Request, SamplingParams
from sppruner.errors import InputError
from sppruner.evaluation import compare, drawn_scenes
from sppruner.evaluation.answering import Answer, SpecEvaluator
from sppruner.evaluation.compare import count_answers
from sppruner.evaluation.dataset import Dataset
from sppruner.models.loading import EMBEDDED, LoadedModel, load_model
from sppruner.pruner import Pruner
from sppruner.spec import DENSE, Budget, PruneSpec

SPARSE = PruneSpec(method="grid", budget=Budget(ratio=0.06))


def any_recall(answer: Answer) -> float | None:
    return None if answer.subject_recall is None else answer.subject_recall[0]


def subject_share(answer: Answer) -> float | None:
    return None if answer.subject_recall is None else answer.subject_recall[1]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(EMBEDDED)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return drawn_scenes(20)


def test_answers_equal_the_engine_s(loaded: LoadedModel, dataset: Dataset) -> None:
    """Evaluation and engine share template, processor and generation settings."""
    engine = BatchEngine(loaded)
    evaluator = SpecEvaluator(loaded, max_new_tokens=48)
    batch = evaluator.build_batch(dataset.items)
    dense, _ = evaluator.answer_dense(batch)
    for spec, texts in (
        (DENSE, dense.texts),
        (SPARSE, [answer.text for answer in evaluator.answer_pruned(batch, SPARSE, dense)]),
    ):
        requests = [
            Request(
                id=item.id,
                prompt=item.prompt,
                images=(item.image(),),
                spec=spec,
                generation=SamplingParams(max_new_tokens=48),
            )
            for item in dataset.items
        ]
        assert texts == [result.text for result in engine.run(requests)]


def test_fidelity_equals_a_plain_forward_over_prompt_and_dense_answer(
    loaded: LoadedModel, dataset: Dataset
) -> None:
    """First-token KL and the dense answer's mean log-probability, recomputed row by row without
    cache, batch or `generate`, for rows that agree with dense and for rows that do not."""
    evaluator = SpecEvaluator(loaded, max_new_tokens=48)
    batch = evaluator.build_batch(dataset.items)
    dense, dense_answers = evaluator.answer_dense(batch)
    answers = evaluator.answer_pruned(batch, SPARSE, dense)
    assert {answer.agrees for answer in answers} == {True, False}
    pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
    for row, (item, tokens) in enumerate(zip(dataset.items, dense.tokens, strict=True)):
        inputs = evaluator.build_batch([item]).inputs
        first, mean = {}, {}
        for spec in (DENSE, SPARSE):
            log_AV = forced_logprobs(loaded, pruner, inputs, item.prompt, spec, tokens)
            first[spec] = log_AV[0]
            mean[spec] = float(log_AV.gather(1, torch.tensor(tokens)[:, None]).mean())
        kl = float((first[DENSE].exp() * (first[DENSE] - first[SPARSE])).nan_to_num().sum())
        assert answers[row].dense_logprob == pytest.approx(mean[SPARSE], abs=2e-3)
        assert dense_answers[row].dense_logprob == pytest.approx(mean[DENSE], abs=2e-3)
        assert answers[row].first_kl == pytest.approx(kl, abs=2e-3)


@torch.no_grad()
def forced_logprobs(loaded, pruner, inputs, prompt, spec, tokens) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """[A, V] log-probabilities of each answer token, given the dense tokens before it."""
    prepared = pruner.prepare(inputs, spec, [prompt])
    answer = torch.tensor([tokens[:-1]], dtype=torch.int64)
    positions = prepared.inputs["position_ids"][:, -1:] + 1 + torch.arange(answer.shape[1])
    extended = {
        **prepared.inputs,
        "input_ids": torch.cat([prepared.inputs["input_ids"], answer], dim=1),
        "attention_mask": torch.cat(
            [prepared.inputs["attention_mask"], torch.ones_like(answer)], dim=1
        ),
        "position_ids": torch.cat([prepared.inputs["position_ids"], positions], dim=1),
    }
    # mm_encoder_outputs is an argument of generate only; forward takes embeddings.
    features = extended.pop("mm_encoder_outputs")["image"].pooler_output
    embeds = loaded.model.get_input_embeddings()(extended["input_ids"])
    visual = extended.pop("input_ids") == pruner.adapter.image_token_id
    embeds[visual] = torch.cat(list(features))
    logits = loaded.model(inputs_embeds=embeds, **extended).logits[0, -len(tokens) :]
    logits[:, pruner.adapter.image_token_id] = -torch.inf
    return logits.float().log_softmax(dim=-1)


def test_keeping_every_token_agrees_with_dense(loaded: LoadedModel, dataset: Dataset) -> None:
    evaluator = SpecEvaluator(loaded, max_new_tokens=48)
    batch = evaluator.build_batch(dataset.items)
    dense, dense_answers = evaluator.answer_dense(batch)
    everything = PruneSpec(method="grid", budget=Budget(ratio=1.0))
    for answer, dense_answer in zip(
        evaluator.answer_pruned(batch, everything, dense), dense_answers, strict=True
    ):
        assert answer.agrees
        assert answer.first_kl == pytest.approx(0, abs=1e-4)
        assert answer.dense_logprob == pytest.approx(dense_answer.dense_logprob, abs=1e-4)
        assert answer.subject_recall == dense_answer.subject_recall
        assert answer.kept_layers == 1.0


def test_a_batch_is_encoded_once_for_specs_with_the_same_signals(
    loaded: LoadedModel, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = SpecEvaluator(loaded, max_new_tokens=4)
    adapter = type(evaluator._pruner.adapter)
    calls = []
    encode = adapter.encode

    def recorded(*args: Any) -> Any:
        calls.append(args[2])
        return encode(*args)

    monkeypatch.setattr(adapter, "encode", recorded)
    specs = [
        PruneSpec(method=m, budget=Budget(ratio=r)) for m in ("grid", "topk") for r in (0.1, 0.2)
    ]
    for half in (dataset.items[:4], dataset.items[4:8]):
        batch = evaluator.build_batch(half)
        dense, _ = evaluator.answer_dense(batch)
        for spec in specs:
            evaluator.answer_pruned(batch, spec, dense)
    assert len(calls) == 4
    assert len(set(calls)) == 2


def test_pruning_inside_the_decoder_is_counted_over_its_layers(
    loaded: LoadedModel, dataset: Dataset
) -> None:
    """FastV keeps every token in the layers before its own; the grid prunes before the decoder."""
    fastv = PruneSpec(method="fastv", budget=Budget(ratio=0.25), options={"layer": 1})
    grid = PruneSpec(method="grid", budget=Budget(ratio=0.25))
    scores = compare(loaded, dataset, [fastv, grid]).scores
    layers = loaded.model.config.text_config.num_hidden_layers
    inside, before = (score.mean(lambda a: a.kept_layers) for score in scores)
    assert inside == pytest.approx((1 + (layers - 1) * 0.25) / layers)
    assert before == pytest.approx(0.25)
    assert scores[0].mean(subject_share) == 1.0


def test_subject_recall_is_zero_without_tokens_and_above_chance(loaded: LoadedModel) -> None:
    """Any-token recall of a budget of 0, of sppruner and of random tokens."""
    dataset = drawn_scenes(40)
    empty = PruneSpec(method="grid", budget=Budget(tokens=0))
    ours = PruneSpec(method="sppruner", budget=Budget(ratio=0.06))
    chance = PruneSpec(method="random", budget=Budget(ratio=0.06))
    nothing, most, some = (
        score.mean(any_recall) for score in compare(loaded, dataset, [empty, ours, chance]).scores
    )
    assert nothing == 0.0
    assert most is not None
    assert some is not None
    assert most > some + 0.2


def test_random_runs_once_per_seed_and_a_given_seed_once(
    loaded: LoadedModel, dataset: Dataset
) -> None:
    free = PruneSpec(method="random", budget=Budget(ratio=0.1))
    fixed = PruneSpec(method="random", budget=Budget(ratio=0.1), options={"seed": 1})
    advanced: list[int] = []
    comparison = compare(loaded, dataset, [free, fixed], seeds=(1, 2), advance=advanced.append)
    assert [len(score.repeats) for score in comparison.scores] == [2, 1]
    assert comparison.scores[0].repeats[0] == comparison.scores[1].repeats[0]
    assert sum(advanced) == count_answers(dataset, [free, fixed], (1, 2)) == 4 * len(dataset.items)


def test_a_spec_the_model_cannot_run_does_not_stop_the_others(
    loaded: LoadedModel, dataset: Dataset
) -> None:
    impossible = PruneSpec(
        method="sppruner", budget=Budget(ratio=0.1), options={"relevance": "clip"}
    )
    comparison = compare(loaded, dataset, [impossible, SPARSE])
    assert [score.spec for score in comparison.scores] == [SPARSE]
    (failed,) = comparison.unsupported
    assert failed.spec == impossible
    assert "CLIP text tower" in failed.reason


def test_batches_of_another_size_give_the_same_scores(
    loaded: LoadedModel, dataset: Dataset
) -> None:
    one = compare(loaded, dataset, [SPARSE], batch_size=7).scores[0]
    other = compare(loaded, dataset, [SPARSE], batch_size=64).scores[0]
    assert (one.per_item == other.per_item).all()


def test_an_image_placeholder_in_the_prompt_is_refused(loaded: LoadedModel) -> None:
    item = drawn_scenes(1).items[0]
    evaluator = SpecEvaluator(loaded, max_new_tokens=4)
    with pytest.raises(InputError, match="stands for an image"):
        evaluator.build_batch(
            [type(item)(**{f: getattr(item, f) for f in item.__slots__} | {"prompt": "<image>?"})]
        )
