"""The shipped weights reach the model card's accuracy on scenes outside its table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.training.families import FAMILIES, Family
from jobs.training.grading import (
    KindScore,
    measure_saliency_auc,
    score_generated,
    score_teacher_forced,
)
from sppruner.evaluation.drawn_scenes import scene_questions
from sppruner.models.loading import LoadedModel, load_model
from sppruner.tiny import TINY_MODELS
from sppruner.tiny.scenes import HELD_OUT_SEED

FRESH = 900_000  # scenes of the reporting split that no table uses
SCENES = 24


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def loaded(family: Family) -> LoadedModel:
    # In float32, which a CPU computes several times as fast: the card was scored in bfloat16.
    return load_model(f"tiny-{family.name}", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def model(loaded: LoadedModel) -> Any:
    return loaded.model


@pytest.fixture(scope="module")
def answers(loaded: LoadedModel) -> dict[str, KindScore]:
    """Scores of the published route: JPEG, processor, `generate`."""
    (scores,) = score_generated(loaded, scene_questions(range(FRESH, FRESH + SCENES)))
    return scores


def _mean(scores: dict[str, KindScore]) -> float:
    kinds = [kind for kind in scores if kind != "caption"]
    return sum(scores[kind].accuracy for kind in kinds) / len(kinds)


def test_shipped_files_are_small_and_bfloat16(family: Family) -> None:
    file = TINY_MODELS[f"tiny-{family.name}"] / "model.safetensors"
    assert file.stat().st_size < 15e6
    assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}


def test_every_kind_is_answered_well(answers: dict[str, KindScore]) -> None:
    # Lower than the card's figures by the noise of a small sample.
    floors = {"nearest": 0.8, "behind": 0.8, "caption": 0.5}
    for kind, score in answers.items():
        assert score.accuracy >= floors.get(kind, 0.9), (kind, score)


def test_generate_agrees_with_teacher_forcing(
    family: Family, model: Any, answers: dict[str, KindScore]
) -> None:
    forced = score_teacher_forced(family, model, SCENES, HELD_OUT_SEED + FRESH)
    assert {kind: score.total for kind, score in forced.items()} == {
        kind: score.total for kind, score in answers.items()
    }
    for kind, score in answers.items():
        # The two routes sum in different orders, so an uncertain answer may flip.
        assert abs(forced[kind].correct - score.correct) <= max(1, 0.06 * score.total), kind


def test_random_ninth_of_the_tokens_is_not_enough(
    family: Family, model: Any, answers: dict[str, KindScore]
) -> None:
    assert (
        _mean(score_teacher_forced(family, model, SCENES, HELD_OUT_SEED + FRESH, kept=16))
        < _mean(answers) - 0.3
    )


def test_saliency_ranks_objects_and_signs_first(family: Family, model: Any) -> None:
    assert measure_saliency_auc(family, model, 40, HELD_OUT_SEED + FRESH)[-1] > 0.9
