"""The settings of a run are rebuilt from what its output keeps of them."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from cluster.config import MediaLimits, RunConfig
from cluster.errors import UsageError
from sppruner import Budget, PruneSpec
from sppruner.engine import SamplingParams
from sppruner.engine.answer_format import AnswerFormat
from sppruner.spec import DENSE
from tests.cluster.corpora import config

SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.3), options={"kappa": 0.5})
SETTINGS: dict[str, list[Any]] = {
    "kind": ["caption", "vqa"],
    "prompt": ["describe", "{question} ¿?"],
    "spec": [SPEC, PruneSpec(method="grid", budget=Budget(tokens=7))],
    "generation": [
        SamplingParams(max_new_tokens=5, temperature=0.5, top_p=0.9, seed=3, stop=("a", "b")),
        SamplingParams(),
        SamplingParams(format=AnswerFormat(choice=("red", "blue"))),
        SamplingParams(format=AnswerFormat(json_schema={"type": "object"})),
    ],
    "limit": [None, 7],
    "unit_rows": [1, 512],
    "unit_bytes": [5, 2**30],
    "auto": [False, True],
    "dtype": ["auto", "bfloat16"],
    "image_column": [None, "picture"],
    "key_column": [None, "id"],
    "question_column": [None, "ask"],
    "engine": [None, "module:engine"],
    "engine_options": [{}, {"quantization": "fp8"}, {"tensor_parallel_size": 2}],
    "format": [None, "webdataset"],
    "dotted_keys": [False, True],
    "media": [MediaLimits(max_bytes=5, formats=("png",)), MediaLimits(max_pixels=9)],
}


@limits(max_examples=40)
@given(
    settings=st.fixed_dictionaries(
        {}, optional={n: st.sampled_from(v) for n, v in SETTINGS.items()}
    )
)
def test_the_settings_that_are_a_run_s_identity_give_that_run(settings: dict[str, Any]) -> None:
    given_config = config("in", "out", **({"spec": SPEC} | settings))
    kept = json.loads(json.dumps(given_config.identity()))
    looked_up = {"model_revision": "r", "image_backend": "pil"}
    rebuilt = RunConfig.of_identity(kept | looked_up, output="out", replicas=3)
    assert rebuilt.identity() == given_config.identity()
    assert rebuilt.replicas == 3


def test_every_setting_of_the_identity_is_tried() -> None:
    """A new one must be among SETTINGS, or rebuilding it is not tested."""
    execution = {
        "replicas",
        "slots",
        "max_error_share",
        "error_share_after",
        "control_blocks",
        "max_attempts",
    }
    places = {"input", "output", "model"}
    assert {part.name for part in fields(RunConfig)} == SETTINGS.keys() | execution | places


@pytest.mark.parametrize(
    "damage",
    [{"spec": 5}, {"generation": {"odd": 1}}, {"media": None}, {"unit_rows": 0}, {"model": None}],
)
def test_settings_that_no_run_can_have_are_a_usage_error(damage: dict[str, Any]) -> None:
    kept = config("in", "out", spec=DENSE).identity() | damage
    with pytest.raises(UsageError):
        RunConfig.of_identity(kept, output="out")
