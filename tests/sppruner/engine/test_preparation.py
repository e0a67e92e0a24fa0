"""A request's spec is resolved once, when the request is prepared, whatever then happens to it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from sppruner.conversation import Turn
from sppruner.engine import BatchEngine, ContinuousEngine, Request, SamplingParams
from sppruner.models.loading import EMBEDDED, LoadedModel, load_model
from sppruner.prompts import build_chat_inputs
from sppruner.selectors import selector_for
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.sppruner.engine.requests import drawn

SPECS = [
    DENSE,
    PruneSpec(method="sppruner", budget=Budget(ratio=0.3)),
    PruneSpec(method="fastv", budget=Budget(ratio=0.5)),
    PruneSpec(method="topk", budget=Budget(tokens=9)),
]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(EMBEDDED)


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(loaded, slots=4)
    yield made
    made.close()


def requests() -> list[Request]:
    """Two questions under each spec about one image."""
    image = drawn(random.Random(0))
    new = SamplingParams(max_new_tokens=3)
    return [
        Request(id=f"{n}{prompt}", prompt=prompt, images=(image,), spec=spec, generation=new)
        for n, spec in enumerate(SPECS)
        for prompt in ("what is it ?", "where is it ?")
    ]


def lookups() -> int:
    """How often a spec's method was looked up so far, in this process."""
    info = selector_for.cache_info()
    return info.hits + info.misses


def test_a_method_is_looked_up_once_per_request(engine: ContinuousEngine) -> None:
    batch = requests()
    before = lookups()
    results = engine.run(batch)
    assert lookups() - before == len(batch)
    assert not [result.error_message for result in results if result.error_code]


def test_a_static_batch_looks_a_method_up_once_for_all_requests_of_a_spec(
    loaded: LoadedModel,
) -> None:
    engine = BatchEngine(loaded, slots=64)
    before = lookups()
    results = engine.run(requests())
    # Dense requests and pruned ones, which have a policy for positions, form two batches.
    assert lookups() - before == len(SPECS)
    assert not [result.error_message for result in results if result.error_code]


def test_a_prepared_request_carries_its_method(engine: ContinuousEngine) -> None:
    request = requests()[2]
    prepared = engine._preparer.prepare(request, 7).result()
    assert (prepared.resolved.spec, prepared.ticket) == (request.spec, 7)
    assert prepared.resolved.selector == selector_for(request.spec)


def test_resolved_specs_and_plain_ones_are_prepared_alike(engine: ContinuousEngine) -> None:
    pruner = engine._pruner
    batch = [engine._preparer.prepare(request, n).result() for n, request in enumerate(requests())]
    for prepared in batch:
        plain = pruner.prepare(prepared.inputs, prepared.request.spec, [prepared.request.prompt])
        resolved = pruner.prepare(prepared.inputs, prepared.resolved, [prepared.request.prompt])
        assert plain.reports == resolved.reports
        assert pruner.signals([prepared.request.spec]) == pruner.signals([prepared.resolved])


@pytest.mark.parametrize("kind", [ContinuousEngine, BatchEngine])
@pytest.mark.parametrize("part", ["prompt", "system"])
def test_a_text_of_megabytes_is_refused_before_it_is_tokenized_and_costs_no_other_row(
    loaded: LoadedModel,
    kind: type[ContinuousEngine | BatchEngine],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = kind(loaded, slots=4)
    long, other = requests()[:2]
    long = replace(long, **{part: "word " * 2_000_000})  # type: ignore[arg-type]
    for module in ("preparation", "static"):
        name = f"sppruner.engine.{module}.build_chat_inputs"
        monkeypatch.setattr(name, _refusing_long_texts(build_chat_inputs))
    results = engine.run([long, other])
    engine.close()
    assert [result.error_code for result in results] == ["prompt_invalid", None]
    assert "characters of prompt exceed the model's context" in str(results[0].error_message)


def _refusing_long_texts(build: Callable[..., Any]) -> Callable[..., Any]:
    def checked(processor: Any, conversations: list[tuple[Turn, ...]], images: Any) -> Any:
        texts = (text for turns in conversations for turn in turns for text in turn.texts)
        assert all(len(text) < 10_000 for text in texts), "it is tokenized"
        return build(processor, conversations, images)

    return checked
