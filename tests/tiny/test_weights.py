"""The shipped weights keep the model card's promises on scenes outside its table."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from sppruner.tiny import MODEL_DIR
from sppruner.tiny.recipe.evaluate import Score, generated, saliency_auc, teacher_forced
from sppruner.tiny.recipe.families import LLAVA
from sppruner.tiny.scenes import HELD_OUT_SEED

FRESH_SEED = HELD_OUT_SEED + 2_000_000
SCENES = 24


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(MODEL_DIR).eval()


@pytest.fixture(scope="module")
def answers(model: LlavaForConditionalGeneration) -> dict[str, Score]:
    """Scores of the real route: JPEG, processor, `generate`."""
    return generated(model, AutoProcessor.from_pretrained(MODEL_DIR), SCENES, FRESH_SEED)


def _mean(scores: dict[str, Score]) -> float:
    kinds = [kind for kind in scores if kind != "caption"]
    return sum(scores[kind].accuracy for kind in kinds) / len(kinds)


def test_shipped_files_are_small_and_bfloat16(model: LlavaForConditionalGeneration) -> None:
    assert model.dtype == torch.bfloat16
    assert (MODEL_DIR / "model.safetensors").stat().st_size < 15e6


def test_every_kind_is_answered_well(answers: dict[str, Score]) -> None:
    # Looser than the card's gates by the noise of a small sample.
    floors = {"nearest": 0.4, "caption": 0.3}
    for kind, score in answers.items():
        assert score.accuracy >= floors.get(kind, 0.9), (kind, score)


def test_generate_agrees_with_teacher_forcing(
    model: LlavaForConditionalGeneration, answers: dict[str, Score]
) -> None:
    forced = teacher_forced(LLAVA, model, SCENES, FRESH_SEED)
    assert {kind: score.asked for kind, score in forced.items()} == {
        kind: score.asked for kind, score in answers.items()
    }
    for kind, score in answers.items():
        # bfloat16 sums differ between the two routes, so an uncertain answer may flip.
        assert abs(forced[kind].right - score.right) <= max(1, 0.06 * score.asked), kind


def test_random_ninth_of_the_tokens_is_not_enough(
    model: LlavaForConditionalGeneration, answers: dict[str, Score]
) -> None:
    assert _mean(teacher_forced(LLAVA, model, SCENES, FRESH_SEED, kept=16)) < _mean(answers) - 0.3


def test_class_token_looks_at_things(model: LlavaForConditionalGeneration) -> None:
    assert saliency_auc(LLAVA, model, 40, FRESH_SEED)[-1] > 0.9
