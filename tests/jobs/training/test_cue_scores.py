"""The oracle keeps what an answer rests on, and every cue keeps as many tokens as it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jobs.training.cue_scores import CUES, KEPT, cue_scores, truth_ranks
from jobs.training.families import LLAVA
from jobs.training.scene_cache import GROUNDS, SceneCache, scene_table
from sppruner.tiny.model import VISUAL_TOKENS, build_model, build_tokenizer
from sppruner.tiny.questions import KINDS, questions
from sppruner.tiny.scenes import sample_scene

SCENES = 6


@pytest.fixture(scope="module")
def table() -> SceneCache:
    return scene_table(0, SCENES, 92)


def test_the_oracle_takes_the_cores_of_the_named_things_first(table: SceneCache) -> None:
    for index in range(SCENES):
        scene = sample_scene(index)
        names = [item.name for item in scene.objects]
        for question in questions(scene):
            asked = [names.index(name) for name in question.about if name in names]
            near, _ = truth_ranks(table, index, scene, question.about)
            mine = np.isin(table.owners[index], asked)
            cores = mine & table.cores[index]
            order = near.argsort(descending=True).numpy()
            assert cores[order[: cores.sum()]].all(), question
            assert mine[order[: mine.sum()]].all() or "sign" in " ".join(question.about)


def test_context_alone_holds_no_thing(table: SceneCache) -> None:
    for index in range(SCENES):
        scene = sample_scene(index)
        for question in questions(scene):
            _, around = truth_ranks(table, index, scene, question.about)
            kept = around.topk(48).indices.numpy()
            assert (table.owners[index][kept] >= GROUNDS).all()


def test_every_cue_is_asked_the_same_questions() -> None:
    model = build_model(build_tokenizer()).eval()
    scores = cue_scores(LLAVA, model, 3, first=0)
    assert set(scores) == {("all", VISUAL_TOKENS)} | {(cue, kept) for cue in CUES for kept in KEPT}
    asked = {kind: score.asked for kind, score in scores["all", VISUAL_TOKENS].items()}
    assert set(asked) <= set(KINDS)
    for told in scores.values():
        assert {kind: score.asked for kind, score in told.items()} == asked


def test_scores_repeat() -> None:
    model = build_model(build_tokenizer()).eval()
    first, second = (cue_scores(LLAVA, model, 2, first=0) for _ in range(2))
    assert first == second
    assert torch.is_grad_enabled()
