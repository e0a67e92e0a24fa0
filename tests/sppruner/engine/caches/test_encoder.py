"""An image is encoded once for all prompts about it, and no answer changes by that."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sppruner.adapters import Encoded, EncodedImage
from sppruner.cost import ImageShape
from sppruner.engine import ContinuousEngine, Request, Result, SamplingParams
from sppruner.engine.caches.encoder import (
    EncoderCache,
    compact_storage,
    hash_images,
    storage_bytes,
    tensors_of,
)
from sppruner.engine.prefill import prefill
from sppruner.engine.preparation import PreparedRequest
from sppruner.errors import MissingSignal, SpecError
from sppruner.models.loading import LoadedModel
from sppruner.signals import ATTENTION, KEYS
from sppruner.spec import DENSE, Budget, PruneSpec
from sppruner.types import VisualTokens
from tests.sppruner.engine.requests import drawn, facts, spec_of
from tests.sppruner.families import FAMILIES, pruner_of
from tests.sppruner.families.folders import write_folder

SPP = PruneSpec(method="sppruner", budget=Budget(ratio=0.3))
MERGING = PruneSpec(method="visionzip", budget=Budget(ratio=0.4))
SPECS = [
    DENSE,
    SPP,
    MERGING,
    spec_of("sppruner:mode=pre+mid", {"ratio": 0.3}),
    spec_of("fastv:layer=2", {"ratio": 0.2}),
    spec_of("prunesid", {"ratio": 0.5, "spread": 0.5}),
]
NEW = SamplingParams(max_new_tokens=3)


@pytest.fixture
def off(loaded: LoadedModel) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(loaded, slots=4, cache_bytes=0)
    yield made
    made.close()


@pytest.fixture
def towers(engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of images that each pass through the tower encoded."""
    passes: list[int] = []
    adapter, features = engine._pruner.adapter, engine._model.model.get_image_features
    encode = adapter.encode

    def counting_images(*args: Any) -> Encoded:
        encoded = encode(*args)
        passes[-1] += len(encoded.images)
        return encoded

    def counting_passes(*args: Any, **kwargs: Any) -> Any:
        passes.append(0)
        return features(*args, **kwargs)

    monkeypatch.setattr(adapter, "encode", counting_images)
    monkeypatch.setattr(engine._model.model, "get_image_features", counting_passes)
    return passes


def question(*images: Image.Image, prompt: str = "what is it?", **changes: Any) -> Request:
    return replace(Request(id=prompt, prompt=prompt, images=images, generation=NEW), **changes)


def prepare(engine: ContinuousEngine, requests: Sequence[Request]) -> list[PreparedRequest]:
    return [engine._preparer.prepare(request, i).result() for i, request in enumerate(requests)]


def answers(engine: ContinuousEngine, requests: list[Request]) -> list[Result]:
    return [facts(result) for result in engine.run(requests)]


def sharing(engine: ContinuousEngine, rng: random.Random, count: int) -> list[Request]:
    """Random questions about few images, under any spec that the model can run."""
    specs = []
    for spec in SPECS:
        try:
            engine.check(spec)
        except (SpecError, MissingSignal):
            continue
        specs.append(spec)
    pool = [drawn(rng) for _ in range(3)]
    made = []
    for number in range(count):
        images = rng.sample(pool, rng.choice([0, 1, 1, 1, 2]))
        text = "what is it? " * rng.randint(1, 3)
        made.append(question(*images, prompt=text, id=str(number), spec=rng.choice(specs)))
    return made


@pytest.mark.parametrize("seed", range(2))
def test_answers_are_the_same_whether_images_are_encoded_once_or_each_time(
    loaded: LoadedModel,
    engine: ContinuousEngine,
    off: ContinuousEngine,
    towers: list[int],
    seed: int,
) -> None:
    requests = sharing(engine, random.Random(seed), 20)
    expected = answers(off, requests)
    assert not [result.error_message for result in expected if result.error_code]
    assert (off.encoder_cache.hits, off.encoder_cache.misses, off.encoder_cache.size) == (0, 0, 0)
    assert answers(engine, requests) == expected
    held = [image for entry in engine.encoder_cache._entries.values() for image in entry.images]
    before = [tensor.clone() for tensor in tensors_of(held)]
    towers.clear()
    assert answers(engine, requests) == expected
    assert not towers, "every image was in the cache"
    assert all(map(torch.equal, tensors_of(held), before)), "shared tensors were changed"

    limit = engine.encoder_cache.size // 2
    small = ContinuousEngine(loaded, slots=4, cache_bytes=limit)
    assert answers(small, requests) == expected
    assert 0 < small.encoder_cache.size <= limit
    small.close()


def test_the_tower_encodes_an_image_once_for_all_questions_about_it(
    engine: ContinuousEngine, towers: list[int]
) -> None:
    image = drawn(random.Random(1))
    questions = [question(image, prompt="what is it? " * n, spec=SPP) for n in range(1, 7)]
    assert not [result.error_message for result in engine.run(questions) if result.error_code]
    assert towers == [1]
    assert (engine.encoder_cache.misses, engine.encoder_cache.hits) == (1, 5)


def test_a_group_encodes_in_one_pass_exactly_what_the_cache_lacks(
    engine: ContinuousEngine, towers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The joined result equals one pass over the whole group."""
    rng = random.Random(2)
    one, two, three = drawn(rng), drawn(rng), drawn(rng)
    pruner, cache = engine._pruner, EncoderCache(2**28)
    prefill(pruner, prepare(engine, [question(one, spec=MERGING)]), cache)
    towers.clear()
    passed: list[Encoded] = []
    unpatched = pruner.prepare

    def recording(*args: Any, encoded: Encoded, **kwargs: Any) -> Any:
        passed.append(encoded)
        return unpatched(*args, encoded=encoded, **kwargs)

    images = [[two, one], [one], [three], [two, one], [three]]
    group = prepare(engine, [question(*shown, spec=MERGING) for shown in images])
    with monkeypatch.context() as patch:
        patch.setattr(pruner, "prepare", recording)
        found = prefill(pruner, group, cache)
    assert towers == [3]
    assert (cache.misses, cache.hits) == (1 + 2, 3)

    for cached, plain in zip(found, prefill(pruner, group), strict=True):
        assert cached.report == plain.report
        torch.testing.assert_close(cached.logits_V, plain.logits_V, atol=1e-4, rtol=1e-4)
    whole = passed[0].images
    numbers = [(row, i) for row, shown in enumerate(images) for i in range(len(shown))]
    assert [(image.row, image.image) for image in whole] == numbers
    for image in whole:
        for number, plane in enumerate(image.planes):
            assert (plane.row, plane.image, plane.plane) == (image.row, image.image, number)


def test_a_changed_pixel_or_tiling_is_another_entry_and_a_changed_prompt_is_not(
    engine: ContinuousEngine,
) -> None:
    image = drawn(random.Random(3))
    first, reworded = prepare(
        engine, [question(image), question(image, prompt="where is it, if it is one?")]
    )
    assert first.images_hash
    assert first.images_hash == reworded.images_hash
    assert prepare(engine, [question()])[0].images_hash == b""

    shapes = [shape for _, shape in engine._pruner.adapter.shapes(first.inputs)]
    assert hash_images(first.inputs, shapes) == first.images_hash
    for name in first.inputs.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        value = first.inputs[name].clone()
        value.view(-1)[-1] = ~value.view(-1)[-1] if value.dtype == torch.bool else 77
        assert hash_images(first.inputs | {name: value}, shapes) != first.images_hash, name
    tiled = [replace(shapes[0], tokens=shapes[0].tokens + 1)]
    assert hash_images(first.inputs, tiled) != first.images_hash

    touched = image.copy()
    touched.putpixel((image.width // 2, image.height // 2), (0, 0, 0))
    other = image.copy()
    other.putpixel((image.width // 2, image.height // 2), (255, 255, 255))
    again = question(touched, prompt="where is it?", spec=SPP)
    engine.run([question(touched, spec=SPP), question(other, spec=SPP), again])
    assert (engine.encoder_cache.misses, engine.encoder_cache.hits) == (2, 1)


def test_equal_tiles_of_other_images_have_another_hash(tmp_path: Path) -> None:
    """InternVL's tiles of blank images are equal in any order: only the prompt shows which image
    they belong to."""
    engine = ContinuousEngine(str(write_folder("internvl", tmp_path)))
    wide, square = Image.new("RGB", (64, 20), "gray"), Image.new("RGB", (32, 32), "gray")
    first, second = prepare(engine, [question(wide, square), question(square, wide)])
    assert first.inputs["pixel_values"].equal(second.inputs["pixel_values"])
    assert first.images_hash != second.images_hash
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_entry_keeps_no_memory_of_its_batch_alive(family: str) -> None:
    adapter = pruner_of(family).adapter
    signals = adapter.capabilities.signals
    single = adapter.encode(FAMILIES[family].batch([1]), signals).images
    batch = adapter.encode(FAMILIES[family].batch([1, 2, 1, 1]), signals).images
    for row in range(4):
        sources = [image for image in batch if image.row == row]
        owned = compact_storage(sources)
        if row == 0:
            assert (
                storage_bytes(owned)
                == storage_bytes(compact_storage(single))
                < storage_bytes(sources)
            )
        for copy_, source in zip(tensors_of(owned), tensors_of(sources), strict=True):
            assert copy_.equal(source)
            assert copy_.stride() == source.stride()
        pointers = [tensor.data_ptr() for tensor in tensors_of(owned)]
        assert [tensor.data_ptr() for tensor in tensors_of(compact_storage(owned))] == pointers


def image_of(values: int) -> EncodedImage:
    """An image of 12 bytes per value, and 12 more."""
    features_ND = torch.zeros(values, 1)
    plane = VisualTokens(
        features_ND=features_ND, hidden_NV=None, coords_N2=torch.zeros(3, 1), signals={}
    )
    return EncodedImage(
        row=0,
        image=0,
        run_ND=features_ND,
        planes=(plane,),
        places=(torch.arange(values),),
        shape=ImageShape(tiles=1, rows=1, columns=values, tokens=values),
    )


class Tower:
    """Encodes keys, which are the number of values as text; records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[bytes], frozenset[str]]] = []

    def read(self, cache: EncoderCache, *keys: bytes, signals: Sequence[str] = ()) -> Encoded:
        def encode(missing: Sequence[int], names: frozenset[str]) -> Encoded:
            self.calls.append(([keys[i] for i in missing], names))
            images = [replace(image_of(int(keys[i])), row=r) for r, i in enumerate(missing)]
            return Encoded(images=tuple(images), output={})

        return cache.get_or_encode(keys, [frozenset(signals)] * len(keys), encode)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_stay_under_the_limit_and_the_least_recently_used_go_first(seed: int) -> None:
    rng, tower = random.Random(seed), Tower()
    cache = EncoderCache(rng.choice([100, 400, 1200]))
    expected: OrderedDict[bytes, int] = OrderedDict()
    for _ in range(60):
        key = str(rng.randint(1, 40)).encode()
        tower.calls.clear()
        encoded = tower.read(cache, key)
        assert encoded.images[0].count == int(key)
        assert bool(tower.calls) == (key not in expected)
        expected.pop(key, None)
        size = 12 * int(key) + 12
        if size <= cache.limit:
            expected[key] = size
        while sum(expected.values()) > cache.limit:
            expected.popitem(last=False)
        assert set(cache._entries) == set(expected)
        assert cache.size == sum(expected.values()) <= cache.limit
        entries = copy.copy(cache._entries)  # reading an entry changes the order of use
        held = [image for entry in entries.values() for image in entry.images]
        assert storage_bytes(held) == cache.size
    assert cache.hits + cache.misses == 60


def test_an_entry_serves_prompts_that_need_no_more_signals_than_it_has() -> None:
    tower, cache = Tower(), EncoderCache(2**20)
    tower.read(cache, b"5", signals=[ATTENTION])
    tower.read(cache, b"5")
    tower.read(cache, b"5", signals=[ATTENTION])
    assert tower.calls == [([b"5"], frozenset({ATTENTION}))]
    tower.read(cache, b"5", signals=[KEYS])
    assert tower.calls[1:] == [([b"5"], frozenset({ATTENTION, KEYS}))], "methods may alternate"
    tower.read(cache, b"5", signals=[ATTENTION, KEYS])
    assert len(tower.calls) == 2
    assert cache.size == 12 * 5 + 12


def test_a_failed_pass_caches_nothing() -> None:
    tower, cache = Tower(), EncoderCache(2**20)
    with pytest.raises(ValueError, match="wide"):
        tower.read(cache, b"5", b"wide")
    assert (cache.size, cache.hits, cache.misses) == (0, 0, 0)
    tower.read(cache, b"5", b"5", b"6")
    assert (cache.hits, cache.misses) == (1, 2)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(SpecError, match="-1 bytes"):
        EncoderCache(-1)
