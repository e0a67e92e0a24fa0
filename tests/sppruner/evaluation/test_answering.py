"""Answers and fidelity on the embedded model, against the engine and a plain forward pass."""

from __future__ import annotations

import pytest
import torch

from sppruner.engine import BatchEngine, Request, SamplingParams
from sppruner.errors import InputError
from sppruner.evaluation import compare, drawn_scenes
from sppruner.evaluation.answering import Asker
from sppruner.evaluation.compare import answers_due
from sppruner.evaluation.dataset import Dataset
from sppruner.models.loading import EMBEDDED, LoadedModel, load_model
from sppruner.pruner import Pruner
from sppruner.spec import DENSE, Budget, PruneSpec

SPARSE = PruneSpec(method="grid", budget=Budget(ratio=0.06))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(EMBEDDED)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return drawn_scenes(20)


def test_answers_are_those_of_the_engine(loaded: LoadedModel, dataset: Dataset) -> None:
    """Same template, same processor, same rules of generation: what is evaluated is what runs."""
    engine = BatchEngine(loaded)
    asker = Asker(loaded, max_new_tokens=48)
    batch = asker.batch(dataset.items)
    dense, _ = asker.dense(batch)
    for spec, texts in (
        (DENSE, dense.texts),
        (SPARSE, [answer.text for answer in asker.pruned(batch, SPARSE, dense)]),
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
    """Row by row, without cache, batch or generate: first-token KL and the dense answer's mean
    log-probability, both for rows that agree with dense and for rows that do not."""
    asker = Asker(loaded, max_new_tokens=48)
    batch = asker.batch(dataset.items)
    dense, given = asker.dense(batch)
    answers = asker.pruned(batch, SPARSE, dense)
    assert {answer.agrees for answer in answers} == {True, False}
    pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
    for row, (item, tokens) in enumerate(zip(dataset.items, dense.tokens, strict=True)):
        inputs = asker.batch([item]).inputs
        first, mean = {}, {}
        for spec in (DENSE, SPARSE):
            log_AV = forced(loaded, pruner, inputs, item.prompt, spec, tokens)
            first[spec] = log_AV[0]
            mean[spec] = float(log_AV.gather(1, torch.tensor(tokens)[:, None]).mean())
        kl = float((first[DENSE].exp() * (first[DENSE] - first[SPARSE])).nan_to_num().sum())
        assert answers[row].dense_logprob == pytest.approx(mean[SPARSE], abs=2e-3)
        assert given[row].dense_logprob == pytest.approx(mean[DENSE], abs=2e-3)
        assert answers[row].first_kl == pytest.approx(kl, abs=2e-3)


@torch.no_grad()
def forced(loaded, pruner, inputs, prompt, spec, tokens) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """[A, V] log-probabilities of each answer token, given the true ones before it."""
    prepared = pruner.prepare(inputs, spec, [prompt])
    answer = torch.tensor([tokens[:-1]], dtype=torch.int64)
    ahead = prepared.inputs["position_ids"][:, -1:] + 1 + torch.arange(answer.shape[1])
    grown = {
        **prepared.inputs,
        "input_ids": torch.cat([prepared.inputs["input_ids"], answer], dim=1),
        "attention_mask": torch.cat(
            [prepared.inputs["attention_mask"], torch.ones_like(answer)], dim=1
        ),
        "position_ids": torch.cat([prepared.inputs["position_ids"], ahead], dim=1),
    }
    # mm_encoder_outputs belongs to generate; forward takes the features as embeddings.
    features = grown.pop("mm_encoder_outputs")["image"].pooler_output
    embeds = loaded.model.get_input_embeddings()(grown["input_ids"])
    visual = grown.pop("input_ids") == pruner.adapter.image_token_id
    embeds[visual] = torch.cat(list(features))
    logits = loaded.model(inputs_embeds=embeds, **grown).logits[0, -len(tokens) :]
    logits[:, pruner.adapter.image_token_id] = -torch.inf
    return logits.float().log_softmax(dim=-1)


def test_dense_against_itself_differs_in_nothing(loaded: LoadedModel, dataset: Dataset) -> None:
    asker = Asker(loaded, max_new_tokens=48)
    batch = asker.batch(dataset.items)
    dense, given = asker.dense(batch)
    everything = PruneSpec(method="grid", budget=Budget(ratio=1.0))
    for one, own in zip(asker.pruned(batch, everything, dense), given, strict=True):
        assert one.agrees
        assert one.first_kl == pytest.approx(0, abs=1e-4)
        assert one.dense_logprob == pytest.approx(own.dense_logprob, abs=1e-4)
        assert one.found == own.found
        assert one.kept_layers == 1.0


def test_a_batch_is_encoded_once_for_specs_with_the_same_signals(
    loaded: LoadedModel, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker = Asker(loaded, max_new_tokens=4)
    inner = asker._pruner.adapter
    calls = []
    encode = type(inner).encode
    monkeypatch.setattr(
        type(inner), "encode", lambda *given: (calls.append(given[2]), encode(*given))[1]
    )
    specs = [
        PruneSpec(method=m, budget=Budget(ratio=r)) for m in ("grid", "topk") for r in (0.1, 0.2)
    ]
    for half in (dataset.items[:4], dataset.items[4:8]):
        batch = asker.batch(half)
        dense, _ = asker.dense(batch)
        for spec in specs:
            asker.pruned(batch, spec, dense)
    assert len(calls) == 4
    assert len(set(calls)) == 2


def test_pruning_inside_the_decoder_is_counted_over_its_layers(
    loaded: LoadedModel, dataset: Dataset
) -> None:
    """FastV keeps every token in front of its layer; a method in front of the decoder none."""
    fastv = PruneSpec(method="fastv", budget=Budget(ratio=0.25), options={"layer": 1})
    grid = PruneSpec(method="grid", budget=Budget(ratio=0.25))
    scores = compare(loaded, dataset, [fastv, grid]).scores
    layers = loaded.model.config.text_config.num_hidden_layers
    inside, before = (score.mean(lambda a: a.kept_layers) for score in scores)
    assert inside == pytest.approx((1 + (layers - 1) * 0.25) / layers)
    assert before == pytest.approx(0.25)
    assert scores[0].mean(lambda a: None if a.found is None else a.found[1]) == 1.0


def test_what_is_kept_of_a_subject_is_found(loaded: LoadedModel) -> None:
    """Keeping nothing finds nothing; a method that keeps subjects finds more than chance."""
    dataset = drawn_scenes(40)
    none = PruneSpec(method="grid", budget=Budget(tokens=0))
    ours = PruneSpec(method="sppruner", budget=Budget(ratio=0.06))
    chance = PruneSpec(method="random", budget=Budget(ratio=0.06))
    nothing, most, some = (
        score.mean(lambda a: None if a.found is None else a.found[0])
        for score in compare(loaded, dataset, [none, ours, chance]).scores
    )
    assert nothing == 0.0
    assert most is not None
    assert some is not None
    assert most > some + 0.2


def test_random_runs_once_per_seed_and_a_named_seed_once(
    loaded: LoadedModel, dataset: Dataset
) -> None:
    free = PruneSpec(method="random", budget=Budget(ratio=0.1))
    fixed = PruneSpec(method="random", budget=Budget(ratio=0.1), options={"seed": 1})
    told: list[int] = []
    done = compare(loaded, dataset, [free, fixed], seeds=(1, 2), advance=told.append)
    assert [len(score.repeats) for score in done.scores] == [2, 1]
    assert done.scores[0].repeats[0] == done.scores[1].repeats[0]
    assert sum(told) == answers_due(dataset, [free, fixed], (1, 2)) == 4 * len(dataset.items)


def test_a_spec_the_model_cannot_run_does_not_stop_the_others(
    loaded: LoadedModel, dataset: Dataset
) -> None:
    impossible = PruneSpec(
        method="sppruner", budget=Budget(ratio=0.1), options={"relevance": "clip"}
    )
    done = compare(loaded, dataset, [impossible, SPARSE])
    assert [score.spec for score in done.scores] == [SPARSE]
    (failed,) = done.cannot
    assert failed.spec == impossible
    assert "CLIP text tower" in failed.reason


def test_batches_of_another_size_give_the_same_scores(
    loaded: LoadedModel, dataset: Dataset
) -> None:
    one = compare(loaded, dataset, [SPARSE], batch_rows=7).scores[0]
    other = compare(loaded, dataset, [SPARSE], batch_rows=64).scores[0]
    assert (one.per_item == other.per_item).all()


def test_words_that_would_be_an_image_are_refused(loaded: LoadedModel) -> None:
    item = drawn_scenes(1).items[0]
    asker = Asker(loaded, max_new_tokens=4)
    with pytest.raises(InputError, match="stands for an image"):
        asker.batch(
            [type(item)(**{f: getattr(item, f) for f in item.__slots__} | {"prompt": "<image>?"})]
        )
