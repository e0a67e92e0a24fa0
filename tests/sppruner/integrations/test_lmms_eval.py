"""The lmms-eval model gives the engine's answers under the spec in its arguments."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from lmms_eval.api.instance import Instance

from sppruner.engine import BatchEngine, Request, SamplingParams
from sppruner.errors import EvaluationError, InputError, SpecError
from sppruner.evaluation import drawn_scenes
from sppruner.integrations.lmms_eval import PrunedModel, manifest
from sppruner.models.loading import EMBEDDED
from sppruner.spec import DENSE, Budget, PruneSpec

SPARSE = PruneSpec(method="grid", budget=Budget(ratio=0.1))
ITEMS = [item for item in drawn_scenes(10).items if not item.separate]


@pytest.fixture(scope="module")
def model() -> PrunedModel:
    pruned = PrunedModel(pretrained=EMBEDDED, method="grid", retain=0.1, batch_size=4)
    pruned.task_dict = {"scenes": {"test": [{"image": item.image()} for item in ITEMS]}}
    return pruned


def instance(number: int, context: str, visual: Any = None, **settings: Any) -> Instance:
    def images(doc: dict[str, Any]) -> list[Any]:
        return [doc["image"]] if visual is None else visual

    return Instance(
        request_type="generate_until",
        arguments=(context, settings, images, number, "scenes", "test"),
        idx=0,
        metadata={"task": "scenes", "doc_id": number, "repeats": 1},
    )


def test_answers_equal_the_engine_s_in_order(model: PrunedModel) -> None:
    instances = [instance(i, item.prompt, max_new_tokens=8) for i, item in enumerate(ITEMS)]
    requests = [
        Request(
            id=item.id,
            prompt=item.prompt,
            images=(item.image(),),
            spec=SPARSE,
            generation=SamplingParams(max_new_tokens=8),
        )
        for item in ITEMS
    ]
    results = BatchEngine(EMBEDDED).run(requests)
    answers = model.generate_until(instances)
    assert [answer.text for answer in answers] == [result.text for result in results]
    counts = answers[0].token_counts
    assert counts is not None
    assert counts.input_tokens == results[0].prompt_tokens


def test_arguments_become_a_spec_with_its_options() -> None:
    text = f"pretrained={EMBEDDED},method=sppruner,retain=0.25,relevance=none"
    pruned = PrunedModel.create_from_arg_string(text, {"batch_size": 2, "device": None})
    assert pruned.spec == PruneSpec(
        method="sppruner", budget=Budget(ratio=0.25), options={"relevance": "none"}
    )
    assert pruned.engine.slots == 2
    assert PrunedModel(pretrained=EMBEDDED, method="none").spec == DENSE


def test_a_placeholder_before_the_prompt_stands_for_the_task_s_image(
    model: PrunedModel,
) -> None:
    plain, marked = model.generate_until(
        [
            instance(0, text, max_new_tokens=8)
            for text in (ITEMS[0].prompt, f"<image>\n{ITEMS[0].prompt}")
        ]
    )
    assert plain.text == marked.text


def test_an_answer_ends_before_a_stop_string(model: PrunedModel) -> None:
    (whole,) = model.generate_until([instance(0, "describe the image.", max_new_tokens=24)])
    word = whole.text.split()[2]
    (cut,) = model.generate_until(
        [instance(0, "describe the image.", max_new_tokens=24, until=[word])]
    )
    assert cut.text == whole.text.split(word)[0]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"context": "what?", "visual": ["film.mp4"]}, InputError),
        ({"context": "what?", "num_beams": 4}, SpecError),
        ({"context": "look <image> here"}, InputError),
    ],
)
def test_unsupported_requests_raise(
    model: PrunedModel, settings: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        model.generate_until([instance(0, **settings)])


def test_unknown_options_and_several_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SpecError, match="no option 'kapa'"):
        PrunedModel(pretrained=EMBEDDED, kapa=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EvaluationError, match="one process"):
        PrunedModel(pretrained=EMBEDDED)


def test_the_manifest_names_a_class_that_exists() -> None:
    found = manifest()
    module, name = str(found.simple_class_path).rsplit(".", 1)
    assert found.model_id == "sppruner"
    assert getattr(importlib.import_module(module), name) is PrunedModel
