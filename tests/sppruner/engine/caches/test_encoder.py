"""An image is encoded once however many prompts ask about it, and no answer shows it."""

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
from sppruner.models.loading import LoadedModel, load_model
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


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_folder(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(loaded, slots=4)
    yield made
    made.close()


@pytest.fixture
def off(loaded: LoadedModel) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(loaded, slots=4, cache_bytes=0)
    yield made
    made.close()


@pytest.fixture
def towers(engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each pass through the tower encoded."""
    passes: list[int] = []
    adapter, features = engine._pruner.adapter, engine._model.model.get_image_features
    encode = adapter.encode

    def encoding(*args: Any) -> Encoded:
        encoded = encode(*args)
        passes[-1] += len(encoded.images)
        return encoded

    def passing(*args: Any, **kwargs: Any) -> Any:
        passes.append(0)
        return features(*args, **kwargs)

    monkeypatch.setattr(adapter, "encode", encoding)
    monkeypatch.setattr(engine._model.model, "get_image_features", passing)
    return passes


def ask(*images: Image.Image, prompt: str = "what is it?", **changes: Any) -> Request:
    return replace(Request(id=prompt, prompt=prompt, images=images, generation=NEW), **changes)


def asked(engine: ContinuousEngine, requests: Sequence[Request]) -> list[PreparedRequest]:
    return [engine._preparer.prepare(request, i).result() for i, request in enumerate(requests)]


def answers(engine: ContinuousEngine, requests: list[Request]) -> list[Result]:
    return [facts(result) for result in engine.run(requests)]


def sharing(engine: ContinuousEngine, rng: random.Random, count: int) -> list[Request]:
    """Questions under any spec that the model can run, about few images."""
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
        question = "what is it? " * rng.randint(1, 3)
        made.append(ask(*images, prompt=question, id=str(number), spec=rng.choice(specs)))
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
    assert not towers, "all of it was at hand"
    assert all(map(torch.equal, tensors_of(held), before)), "what prompts share was changed"

    limit = engine.encoder_cache.size // 2
    little = ContinuousEngine(loaded, slots=4, cache_bytes=limit)
    assert answers(little, requests) == expected
    assert 0 < little.encoder_cache.size <= limit
    little.close()


def test_the_tower_sees_an_image_once_however_many_questions_are_asked_about_it(
    engine: ContinuousEngine, towers: list[int]
) -> None:
    image = drawn(random.Random(1))
    questions = [ask(image, prompt="what is it? " * n, spec=SPP) for n in range(1, 7)]
    assert not [result.error_message for result in engine.run(questions) if result.error_code]
    assert towers == [1]
    assert (engine.encoder_cache.misses, engine.encoder_cache.hits) == (1, 5)


def test_a_group_encodes_together_what_is_not_held_and_nothing_else(
    engine: ContinuousEngine, towers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And puts all of it together as one pass over the whole group would have."""
    rng = random.Random(2)
    one, two, three = drawn(rng), drawn(rng), drawn(rng)
    pruner, encodings = engine._pruner, EncoderCache(2**28)
    prefill(pruner, asked(engine, [ask(one, spec=MERGING)]), encodings)
    towers.clear()
    given: list[Encoded] = []
    prepare = pruner.prepare

    def noting(*args: Any, encoded: Encoded, **kwargs: Any) -> Any:
        given.append(encoded)
        return prepare(*args, encoded=encoded, **kwargs)

    images = [[two, one], [one], [three], [two, one], [three]]
    group = asked(engine, [ask(*shown, spec=MERGING) for shown in images])
    with monkeypatch.context() as patch:
        patch.setattr(pruner, "prepare", noting)
        found = prefill(pruner, group, encodings)
    assert towers == [3]
    assert (encodings.misses, encodings.hits) == (1 + 2, 3)

    for shared, alone in zip(found, prefill(pruner, group), strict=True):
        assert shared.report == alone.report
        torch.testing.assert_close(shared.logits_V, alone.logits_V, atol=1e-4, rtol=1e-4)
    whole = given[0].images
    numbers = [(row, i) for row, shown in enumerate(images) for i in range(len(shown))]
    assert [(image.row, image.image) for image in whole] == numbers
    for image in whole:
        for number, plane in enumerate(image.planes):
            assert (plane.row, plane.image, plane.plane) == (image.row, image.image, number)


def test_a_changed_pixel_or_cut_is_another_entry_and_other_words_are_not(
    engine: ContinuousEngine,
) -> None:
    image = drawn(random.Random(3))
    first, reworded = asked(engine, [ask(image), ask(image, prompt="where is it, if it is one?")])
    assert first.images_hash
    assert first.images_hash == reworded.images_hash
    assert asked(engine, [ask()])[0].images_hash == b""

    shapes = [shape for _, shape in engine._pruner.adapter.shapes(first.inputs)]
    assert hash_images(first.inputs, shapes) == first.images_hash
    for name in first.inputs.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        value = first.inputs[name].clone()
        value.view(-1)[-1] = ~value.view(-1)[-1] if value.dtype == torch.bool else 77
        assert hash_images(first.inputs | {name: value}, shapes) != first.images_hash, name
    cut = [replace(shapes[0], tokens=shapes[0].tokens + 1)]
    assert hash_images(first.inputs, cut) != first.images_hash

    touched = image.copy()
    touched.putpixel((image.width // 2, image.height // 2), (0, 0, 0))
    other = image.copy()
    other.putpixel((image.width // 2, image.height // 2), (255, 255, 255))
    again = ask(touched, prompt="where is it?", spec=SPP)
    engine.run([ask(touched, spec=SPP), ask(other, spec=SPP), again])
    assert (engine.encoder_cache.misses, engine.encoder_cache.hits) == (2, 1)


def test_images_whose_tiles_are_alike_but_cut_otherwise_are_told_apart(tmp_path: Path) -> None:
    """InternVL's tiles of blank images are equal in any order: only the prompt says whose they
    are."""
    engine = ContinuousEngine(str(write_folder("internvl", tmp_path)))
    wide, square = Image.new("RGB", (64, 20), "gray"), Image.new("RGB", (32, 32), "gray")
    first, second = asked(engine, [ask(wide, square), ask(square, wide)])
    assert first.inputs["pixel_values"].equal(second.inputs["pixel_values"])
    assert first.images_hash != second.images_hash
    engine.close()


def test_control_requests_are_encoded_on_both_sides_and_leave_nothing(
    engine: ContinuousEngine, towers: list[int]
) -> None:
    known, fresh = drawn(random.Random(4)), drawn(random.Random(5))
    engine.run([ask(known, spec=SPP)])
    before = (engine.encoder_cache.misses, engine.encoder_cache.hits, engine.encoder_cache.size)
    towers.clear()
    for image in (known, fresh):
        (result,) = engine.run([ask(image, spec=SPP, control=True)])
        assert result.control_text is not None
    assert towers == [1] * 4
    assert (
        engine.encoder_cache.misses,
        engine.encoder_cache.hits,
        engine.encoder_cache.size,
    ) == before


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_entry_holds_nothing_of_the_batch_it_was_encoded_in(family: str) -> None:
    adapter = pruner_of(family).adapter
    signals = adapter.capabilities.signals
    alone = adapter.encode(FAMILIES[family].batch([1]), signals).images
    batch = adapter.encode(FAMILIES[family].batch([1, 2, 1, 1]), signals).images
    for row in range(4):
        theirs = [image for image in batch if image.row == row]
        owned = compact_storage(theirs)
        if row == 0:
            assert (
                storage_bytes(owned)
                == storage_bytes(compact_storage(alone))
                < storage_bytes(theirs)
            )
        for mine, source in zip(tensors_of(owned), tensors_of(theirs), strict=True):
            assert mine.equal(source)
            assert mine.stride() == source.stride()
        pointers = [tensor.data_ptr() for tensor in tensors_of(owned)]
        assert [tensor.data_ptr() for tensor in tensors_of(compact_storage(owned))] == pointers


def image_of(values: int) -> EncodedImage:
    """An image of 12 bytes a value, and 12 more."""
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
    """Encodes contents, which are written as how many values they hold; notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[bytes], frozenset[str]]] = []

    def give(
        self, encodings: EncoderCache, *contents: bytes, signals: Sequence[str] = ()
    ) -> Encoded:
        def encode(missing: Sequence[int], read: frozenset[str]) -> Encoded:
            self.asked.append(([contents[i] for i in missing], read))
            images = [replace(image_of(int(contents[i])), row=r) for r, i in enumerate(missing)]
            return Encoded(images=tuple(images), output={})

        return encodings.get_or_encode(contents, [frozenset(signals)] * len(contents), encode)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_stay_under_the_limit_and_the_longest_unasked_go_first(seed: int) -> None:
    rng, tower = random.Random(seed), Tower()
    encodings = EncoderCache(rng.choice([100, 400, 1200]))
    expected: OrderedDict[bytes, int] = OrderedDict()
    for _ in range(60):
        content = str(rng.randint(1, 40)).encode()
        tower.asked.clear()
        encoded = tower.give(encodings, content)
        assert encoded.images[0].count == int(content)
        assert bool(tower.asked) == (content not in expected)
        expected.pop(content, None)
        size = 12 * int(content) + 12
        if size <= encodings.limit:
            expected[content] = size
        while sum(expected.values()) > encodings.limit:
            expected.popitem(last=False)
        assert set(encodings._entries) == set(expected)
        assert encodings.size == sum(expected.values()) <= encodings.limit
        looked = copy.copy(encodings._entries)  # looking at an entry makes it the last asked for
        held = [image for entry in looked.values() for image in entry.images]
        assert storage_bytes(held) == encodings.size
    assert encodings.hits + encodings.misses == 60


def test_an_entry_serves_whoever_needs_no_more_signals_than_it_has() -> None:
    tower, encodings = Tower(), EncoderCache(2**20)
    tower.give(encodings, b"5", signals=[ATTENTION])
    tower.give(encodings, b"5")
    tower.give(encodings, b"5", signals=[ATTENTION])
    assert tower.asked == [([b"5"], frozenset({ATTENTION}))]
    tower.give(encodings, b"5", signals=[KEYS])
    assert tower.asked[1:] == [([b"5"], frozenset({ATTENTION, KEYS}))], "methods may take turns"
    tower.give(encodings, b"5", signals=[ATTENTION, KEYS])
    assert len(tower.asked) == 2
    assert encodings.size == 12 * 5 + 12


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    tower, encodings = Tower(), EncoderCache(2**20)
    with pytest.raises(ValueError, match="wide"):
        tower.give(encodings, b"5", b"wide")
    assert (encodings.size, encodings.hits, encodings.misses) == (0, 0, 0)
    tower.give(encodings, b"5", b"5", b"6")
    assert (encodings.hits, encodings.misses) == (1, 2)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(SpecError, match="-1 bytes"):
        EncoderCache(-1)
