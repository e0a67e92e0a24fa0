"""Accuracy by selection cue: an oracle, and each cue by itself.

Every question gets a ranking of the visual tokens and keeps the first K at their positions:

    oracle      ground truth: patches of the entities the answer depends on, then their surroundings
    relevance   cosine to the question's words, the maximum over words
    saliency    the family's attention saliency in the last layer
    context     ground truth: the surroundings of those entities, nearest first, without any object
    random      no cue

If one cue sufficed, methods that combine cues could not be distinguished on this model.
Shapes: B images, N = 144 visual tokens, D width, T question tokens.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from jobs.training.families import Family
from jobs.training.grading import KindScore, grade_answers
from jobs.training.packing import compute_answer_logits, pack_questions
from jobs.training.scene_cache import (
    CAPTION_KIND,
    GROUNDS,
    PATCH_CENTERS,
    SIGNS,
    Array,
    SceneCache,
    build_scene_table,
)
from jobs.training.vision import normalise_images
from sppruner.tiny.layout import Scene
from sppruner.tiny.model import SPECIAL_TOKENS, VISUAL_TOKENS, build_tokenizer
from sppruner.tiny.questions import questions
from sppruner.tiny.scenes import HELD_OUT_SEED, JPEG_QUALITY, sample_scene

__all__ = ["CUES", "KEPT", "rank_by_truth", "score_cues"]

CUES: Final = ("oracle", "relevance", "saliency", "context", "random")
KEPT: Final = (48, 32, 16)
_STOP_WORDS: Final = "a are color colour how is many number of on the there to what where ?".split()
_CPU: Final = torch.device("cpu")


@torch.inference_mode()
def score_cues(
    family: Family, model: Any, scenes: int, first: int = HELD_OUT_SEED, batch: int = 10
) -> dict[tuple[str, int], dict[str, KindScore]]:
    """Exact match per kind for every (cue, kept tokens), without captions; dense is ("all", 144).

    Teacher forcing, which equals greedy decoding here.
    """
    cache = build_scene_table(first, scenes, JPEG_QUALITY)
    scores: dict[tuple[str, int], dict[str, KindScore]] = defaultdict(
        lambda: defaultdict(KindScore)
    )
    generator = torch.Generator().manual_seed(0)
    for start in range(0, scenes, batch):
        rows = np.arange(start, min(start + batch, scenes))
        images = normalise_images(cache, rows, _CPU)
        tokens_BND, _ = family.build_vision_encoder(model)(images.to(model.dtype))
        saliency_BN = family.saliency(model, images)[-1]
        groups: list[Array] = []
        owners: list[int] = []
        ranks: dict[str, list[Tensor]] = defaultdict(list)
        for row, index in enumerate(rows):
            scene = sample_scene(first + int(index))
            numbers = np.arange(cache.starts[index], cache.starts[index + 1])
            numbers = numbers[cache.spans[numbers, 3] != CAPTION_KIND]
            for number, question in zip(numbers, questions(scene), strict=True):
                groups.append(np.array([number]))
                owners.append(row)
                near, around = rank_by_truth(cache, int(index), scene, question.about)
                ranks["oracle"].append(near)
                ranks["context"].append(around)
                ranks["relevance"].append(_score_relevance(model, tokens_BND[row], cache, number))
                ranks["saliency"].append(saliency_BN[row])
                ranks["random"].append(torch.rand(VISUAL_TOKENS, generator=generator))
        text = pack_questions(cache, groups, _CPU)
        visual = tokens_BND[owners]
        for kind, correct in grade_answers(
            compute_answer_logits(family, model, visual, text), text
        ):
            scores["all", VISUAL_TOKENS][kind].add(correct)
        for cue in CUES:
            order = torch.stack(ranks[cue]).argsort(dim=1, descending=True, stable=True)
            for kept in KEPT:
                keep = order[:, :kept].sort(1).values
                for kind, correct in grade_answers(
                    compute_answer_logits(family, model, visual, text, keep), text
                ):
                    scores[cue, kept][kind].add(correct)
    return scores


def rank_by_truth(
    cache: SceneCache, index: int, scene: Scene, about: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Two rankings (144,): the named entities, then their surroundings; the surroundings only."""
    names = {item.name: i for i, item in enumerate(scene.objects)}
    names |= {f"{sign.color} sign": SIGNS + i for i, sign in enumerate(scene.signs)}
    grounds = {ground.name: GROUNDS + i for i, ground in enumerate(scene.grounds)}
    entities = [names[name] for name in about if name in names]
    grounds_named = [grounds[name] for name in about if name in grounds]
    owners = cache.owners[index].astype(np.int64)
    centers = cache.centers[index][entities] if entities else np.full((1, 2), 0.5)
    gaps = np.linalg.norm(PATCH_CENTERS[:, None] - centers, axis=2).min(1)
    around = -gaps - 10.0 * (owners < GROUNDS)
    on_entities = np.isin(owners, entities)
    near = -gaps + 10.0 * on_entities + 10.0 * (on_entities & cache.cores[index])
    # Of a ground only the nearest patches: all of it would leave no budget for anything else.
    near += 5.0 * np.isin(owners, grounds_named)
    return torch.from_numpy(near), torch.from_numpy(around)


def _score_relevance(model: Any, tokens_ND: Tensor, cache: SceneCache, question: int) -> Tensor:
    """(144,) maximum centred cosine to a word of the question."""
    first, length, answer, _ = cache.spans[question]
    ids = [int(i) for i in cache.tokens[first : first + length - answer] if int(i) not in _SKIPPED]
    words_TD = model.get_input_embeddings()(torch.tensor(ids)).float()
    cosine_NT = normalize(tokens_ND.float(), dim=1) @ normalize(words_TD, dim=1).T
    return (cosine_NT - cosine_NT.mean(0)).amax(1)


_SKIPPED: Final = frozenset(
    build_tokenizer().convert_tokens_to_ids([*_STOP_WORDS, *SPECIAL_TOKENS])
)
