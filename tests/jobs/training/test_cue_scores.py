"""The oracle ranks the entities of the answer first, and every cue scores the same questions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jobs.training.cue_scores import CUES, KEPT, rank_by_truth, score_cues
from jobs.training.families import LLAVA
from jobs.training.scene_cache import GROUNDS, SceneCache, build_scene_table
from sppruner.tiny.model import VISUAL_TOKENS, build_model, build_tokenizer
from sppruner.tiny.questions import KINDS, questions
from sppruner.tiny.scenes import sample_scene

SCENES = 6


@pytest.fixture(scope="module")
def table() -> SceneCache:
    return build_scene_table(0, SCENES, 92)


def test_the_oracle_ranks_the_cores_of_the_named_entities_first(table: SceneCache) -> None:
    for index in range(SCENES):
        scene = sample_scene(index)
        names = [item.name for item in scene.objects]
        for question in questions(scene):
            entities = [names.index(name) for name in question.about if name in names]
            near, _ = rank_by_truth(table, index, scene, question.about)
            on_entities = np.isin(table.owners[index], entities)
            cores = on_entities & table.cores[index]
            order = near.argsort(descending=True).numpy()
            assert cores[order[: cores.sum()]].all(), question
            assert on_entities[order[: on_entities.sum()]].all() or "sign" in " ".join(
                question.about
            )


def test_the_context_ranking_contains_no_object_or_sign(table: SceneCache) -> None:
    for index in range(SCENES):
        scene = sample_scene(index)
        for question in questions(scene):
            _, around = rank_by_truth(table, index, scene, question.about)
            kept = around.topk(48).indices.numpy()
            assert (table.owners[index][kept] >= GROUNDS).all()


def test_every_cue_scores_the_same_questions() -> None:
    model = build_model(build_tokenizer()).eval()
    scores = score_cues(LLAVA, model, 3, first=0)
    assert set(scores) == {("all", VISUAL_TOKENS)} | {(cue, kept) for cue in CUES for kept in KEPT}
    total = {kind: score.total for kind, score in scores["all", VISUAL_TOKENS].items()}
    assert set(total) <= set(KINDS)
    for by_kind in scores.values():
        assert {kind: score.total for kind, score in by_kind.items()} == total


def test_scores_repeat() -> None:
    model = build_model(build_tokenizer()).eval()
    first, second = (score_cues(LLAVA, model, 2, first=0) for _ in range(2))
    assert first == second
    assert torch.is_grad_enabled()
