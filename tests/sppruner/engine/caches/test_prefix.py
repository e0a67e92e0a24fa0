"""A beginning that prompts share is read once, and no answer shows it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from sppruner.engine import BatchEngine, ContinuousEngine, Request, SamplingParams
from sppruner.engine.caches.encoder import EncoderCache
from sppruner.engine.caches.prefix import PrefixCache
from sppruner.engine.prefill import prefill
from sppruner.engine.preparation import PreparedRequest
from sppruner.errors import MissingSignal, SpecError
from sppruner.models.loading import LoadedModel, load_model
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.sppruner.engine.requests import drawn, facts, spec_of
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.folders import write_folder

BLIND = PruneSpec(method="visionzip", budget=Budget(ratio=0.4))  # goes by the image alone
READING = PruneSpec(method="sppruner", budget=Budget(ratio=0.3))  # goes by the question, too
STAGED = [
    spec_of("sppruner:mode=pre+mid", {"ratio": 0.3}),
    spec_of("fastv:layer=2", {"ratio": 0.2}),
]
SPECS = [
    DENSE,
    BLIND,
    READING,
    *STAGED,
    spec_of("random", {"tokens": 0}),
    spec_of("topk", {"ratio": 0.3}, positions="renumber"),
    spec_of("prunesid", {"ratio": 0.5, "spread": 0.5}),
]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_folder(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(loaded, slots=4)
    yield made
    made.close()


def ask(*images: Image.Image, prompt: str = "what is it?", **changes: Any) -> Request:
    new = SamplingParams(max_new_tokens=4)
    return replace(Request(id=prompt, prompt=prompt, images=images, generation=new), **changes)


def prepared(engine: ContinuousEngine, *requests: Request) -> list[PreparedRequest]:
    return [engine._preparer.prepare(request, i).result() for i, request in enumerate(requests)]


def runnable(engine: ContinuousEngine) -> list[PruneSpec]:
    specs = []
    for spec in SPECS:
        try:
            engine.check(spec)
        except (SpecError, MissingSignal):
            continue
        specs.append(spec)
    return specs


@pytest.mark.parametrize("seed", range(2))
def test_answers_and_reports_are_those_of_prompts_that_are_read_whole(
    loaded: LoadedModel, engine: ContinuousEngine, seed: int
) -> None:
    rng, specs = random.Random(seed), runnable(engine)
    pool = [drawn(rng) for _ in range(2)]
    asked = [
        ask(
            *rng.sample(pool, rng.choice([0, 1, 1, 1, 2])),
            prompt="what is it? " * rng.randint(1, 3),
            spec=rng.choice(specs),
            id=str(number),
        )
        for number in range(24)
    ]
    expected = [facts(result) for result in BatchEngine(loaded, slots=1).run(asked)]
    assert not [result.error_message for result in expected if result.error_code]
    for _ in range(2):
        assert [facts(result) for result in engine.run(asked)] == expected
    named = sum(one.prefix_key is not None for one in prepared(engine, *asked))
    assert engine.prefix_cache.hits >= named > 10


def test_keys_values_and_positions_are_those_of_a_prompt_that_is_read_whole(
    engine: ContinuousEngine,
) -> None:
    rng, pruner = random.Random(5), engine._pruner
    one, two = drawn(rng), drawn(rng)
    shown = [(one,), (one, two), (one,), (one, two), (two,)]
    asked = [
        ask(*images, prompt="what is it? " * (1 + n % 3), spec=BLIND)
        for n, images in enumerate(shown)
    ]
    group = prepared(engine, *asked)
    prefixes = PrefixCache(2**28)
    shared = prefill(pruner, group, EncoderCache(2**28), prefixes)
    assert (prefixes.misses, prefixes.hits) == (3, 2)
    for ours, whole in zip(shared, prefill(pruner, group), strict=True):
        assert ours.report == whole.report
        assert ours.ids == whole.ids
        assert ours.positions == whole.positions
        torch.testing.assert_close(ours.logits_V, whole.logits_V, atol=1e-4, rtol=1e-4)
        for mine, theirs in zip(ours.keys + ours.values, whole.keys + whole.values, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_decoder_reads_a_shared_image_once_and_then_the_questions_alone(
    engine: ContinuousEngine,
) -> None:
    read: list[int] = []
    decoder = engine._pruner.adapter.language_model()
    hook = decoder.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: read.append((args or tuple(kwargs.values()))[0].shape[1]),
        with_kwargs=True,
    )
    image = drawn(random.Random(1))
    first, second = prepared(engine, *(ask(image, spec=BLIND, prompt=p) for p in ("a b c", "d")))
    prefixes, encodings = PrefixCache(2**28), EncoderCache(2**28)
    prefill(engine._pruner, [first], encodings, prefixes)
    prefill(engine._pruner, [second], encodings, prefixes)
    hook.remove()
    assert read[0] > second.suffix_tokens
    assert read[1:] == [second.suffix_tokens]


def test_what_is_chosen_by_the_question_is_shared_for_the_same_question_alone(
    engine: ContinuousEngine,
) -> None:
    image, other = drawn(random.Random(2)), drawn(random.Random(3))
    asks = [
        ask(image),
        ask(image, prompt="where is it?"),
        ask(other),
        ask(image, system="be brief ."),
        ask(),
    ]

    def names(spec: PruneSpec) -> list[Any]:
        return [
            asked.prefix_key for asked in prepared(engine, *(replace(a, spec=spec) for a in asks))
        ]

    for spec in (DENSE, BLIND):
        same, reworded, elsewhere, told, imageless = names(spec)
        assert same == reworded
        assert len({same, elsewhere, told, None}) == 4
        assert imageless is None
    same, reworded, *_ = names(READING)
    assert same != reworded
    assert same == names(READING)[0] != names(replace(READING, budget=Budget(ratio=0.5)))[0]
    for spec in runnable(engine):
        if spec in STAGED:
            assert set(names(spec)) == {None}


def test_control_requests_are_read_whole_on_both_sides(engine: ContinuousEngine) -> None:
    image = drawn(random.Random(4))
    engine.run([ask(image, spec=BLIND), ask(image)])
    before = engine.prefix_cache.hits, engine.prefix_cache.misses, engine.prefix_cache.size
    (result,) = engine.run([ask(image, spec=BLIND, control=True)])
    assert result.control_text is not None
    assert (
        engine.prefix_cache.hits,
        engine.prefix_cache.misses,
        engine.prefix_cache.size,
    ) == before


def test_bytes_stay_under_the_limit(loaded: LoadedModel, engine: ContinuousEngine) -> None:
    rng = random.Random(6)
    asked = [ask(drawn(rng), id=str(n)) for n in range(6)]
    expected = [facts(result) for result in engine.run(asked)]
    held = list(copy.copy(engine.prefix_cache._entries).values())
    owned = {t.untyped_storage().data_ptr(): t.untyped_storage() for p in held for t in p.keys}
    assert 2 * sum(storage.nbytes() for storage in owned.values()) == engine.prefix_cache.size
    limit = engine.prefix_cache.size // 2
    little = ContinuousEngine(loaded, slots=4, cache_bytes=limit)
    assert [facts(result) for result in little.run(asked)] == expected
    assert 0 < little.prefix_cache.size <= limit
    little.close()


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(SpecError, match="-1 bytes"):
        PrefixCache(-1)
