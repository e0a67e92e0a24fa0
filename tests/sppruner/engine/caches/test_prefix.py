"""A prefix that prompts share is read once, and no answer changes by that."""

from __future__ import annotations

import copy
import random
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
from sppruner.models.loading import LoadedModel
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.sppruner.engine.requests import drawn, facts, spec_of

BY_IMAGE = PruneSpec(method="visionzip", budget=Budget(ratio=0.4))  # selects by the image only
BY_TEXT = PruneSpec(method="sppruner", budget=Budget(ratio=0.3))  # selects by the question, too
STAGED = [
    spec_of("sppruner:mode=pre+mid", {"ratio": 0.3}),
    spec_of("fastv:layer=2", {"ratio": 0.2}),
]
SPECS = [
    DENSE,
    BY_IMAGE,
    BY_TEXT,
    *STAGED,
    spec_of("random", {"tokens": 0}),
    spec_of("topk", {"ratio": 0.3}, positions="renumber"),
    spec_of("prunesid", {"ratio": 0.5, "spread": 0.5}),
]


def question(*images: Image.Image, prompt: str = "what is it?", **changes: Any) -> Request:
    new = SamplingParams(max_new_tokens=4)
    return replace(Request(id=prompt, prompt=prompt, images=images, generation=new), **changes)


def prepare(engine: ContinuousEngine, *requests: Request) -> list[PreparedRequest]:
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
def test_answers_and_reports_equal_those_of_prompts_that_are_read_whole(
    loaded: LoadedModel, engine: ContinuousEngine, seed: int
) -> None:
    rng, specs = random.Random(seed), runnable(engine)
    pool = [drawn(rng) for _ in range(2)]
    batch = [
        question(
            *rng.sample(pool, rng.choice([0, 1, 1, 1, 2])),
            prompt="what is it? " * rng.randint(1, 3),
            spec=rng.choice(specs),
            id=str(number),
        )
        for number in range(24)
    ]
    expected = [facts(result) for result in BatchEngine(loaded, slots=1).run(batch)]
    assert not [result.error_message for result in expected if result.error_code]
    for _ in range(2):
        assert [facts(result) for result in engine.run(batch)] == expected
    shareable = sum(one.prefix_key is not None for one in prepare(engine, *batch))
    assert engine.prefix_cache.hits >= shareable > 10


def test_keys_values_and_positions_equal_those_of_a_prompt_that_is_read_whole(
    engine: ContinuousEngine,
) -> None:
    rng, pruner = random.Random(5), engine._pruner
    one, two = drawn(rng), drawn(rng)
    shown = [(one,), (one, two), (one,), (one, two), (two,)]
    questions = [
        question(*images, prompt="what is it? " * (1 + n % 3), spec=BY_IMAGE)
        for n, images in enumerate(shown)
    ]
    group = prepare(engine, *questions)
    prefixes = PrefixCache(2**28)
    shared = prefill(pruner, group, EncoderCache(2**28), prefixes)
    assert (prefixes.misses, prefixes.hits) == (3, 2)
    for joined, whole in zip(shared, prefill(pruner, group), strict=True):
        assert joined.report == whole.report
        assert joined.ids == whole.ids
        assert joined.positions == whole.positions
        torch.testing.assert_close(joined.logits_V, whole.logits_V, atol=1e-4, rtol=1e-4)
        for found, due in zip(joined.keys + joined.values, whole.keys + whole.values, strict=True):
            torch.testing.assert_close(found, due, atol=1e-4, rtol=1e-4)


def test_the_decoder_reads_a_shared_image_once_and_then_only_suffixes(
    engine: ContinuousEngine,
) -> None:
    read: list[int] = []
    decoder = engine._pruner.adapter.language_model()
    hook = decoder.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: read.append((args or tuple(kwargs.values()))[0].shape[1]),
        with_kwargs=True,
    )
    image = drawn(random.Random(1))
    first, second = prepare(
        engine, *(question(image, spec=BY_IMAGE, prompt=p) for p in ("a b c", "d"))
    )
    prefixes, encoder_cache = PrefixCache(2**28), EncoderCache(2**28)
    prefill(engine._pruner, [first], encoder_cache, prefixes)
    prefill(engine._pruner, [second], encoder_cache, prefixes)
    hook.remove()
    assert read[0] > second.suffix_tokens
    assert read[1:] == [second.suffix_tokens]


def test_a_prefix_selected_by_the_question_is_shared_for_that_question_only(
    engine: ContinuousEngine,
) -> None:
    image, other = drawn(random.Random(2)), drawn(random.Random(3))
    questions = [
        question(image),
        question(image, prompt="where is it?"),
        question(other),
        question(image, system="be brief ."),
        question(),
    ]

    def keys(spec: PruneSpec) -> list[Any]:
        return [
            one.prefix_key for one in prepare(engine, *(replace(q, spec=spec) for q in questions))
        ]

    for spec in (DENSE, BY_IMAGE):
        same, reworded, elsewhere, instructed, imageless = keys(spec)
        assert same == reworded
        assert len({same, elsewhere, instructed, None}) == 4
        assert imageless is None
    same, reworded, *_ = keys(BY_TEXT)
    assert same != reworded
    assert same == keys(BY_TEXT)[0] != keys(replace(BY_TEXT, budget=Budget(ratio=0.5)))[0]
    for spec in runnable(engine):
        if spec in STAGED:
            assert set(keys(spec)) == {None}


def test_bytes_stay_under_the_limit(loaded: LoadedModel, engine: ContinuousEngine) -> None:
    rng = random.Random(6)
    batch = [question(drawn(rng), id=str(n)) for n in range(6)]
    expected = [facts(result) for result in engine.run(batch)]
    held = list(copy.copy(engine.prefix_cache._entries).values())
    owned = {t.untyped_storage().data_ptr(): t.untyped_storage() for p in held for t in p.keys}
    assert 2 * sum(storage.nbytes() for storage in owned.values()) == engine.prefix_cache.size
    limit = engine.prefix_cache.size // 2
    small = ContinuousEngine(loaded, slots=4, cache_bytes=limit)
    assert [facts(result) for result in small.run(batch)] == expected
    assert 0 < small.prefix_cache.size <= limit
    small.close()


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(SpecError, match="-1 bytes"):
        PrefixCache(-1)
