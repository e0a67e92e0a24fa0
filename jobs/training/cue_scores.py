"""What a kept set needs: the oracle, and what each cue alone achieves.

Every question gets a ranking of the visual tokens and keeps the first K at their original places:

    oracle      the truth: patches of the things the answer rests on, then their surroundings
    relevance   cosine to the question's words, the best over words
    saliency    the family's attention saliency in the last layer
    context     the truth: what surrounds those things, nearest first, without any thing at all
    random      no cue

If one cue sufficed, methods that combine them could not be told apart on this model.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from jobs.training.families import Family
from jobs.training.grading import Score, graded
from jobs.training.packing import answer_logits, pack_questions
from jobs.training.scene_cache import (
    CAPTION_KIND,
    GROUNDS,
    PATCH_CENTERS,
    SIGNS,
    Array,
    SceneCache,
    scene_table,
)
from jobs.training.vision import pixels
from sppruner.tiny.layout import Scene
from sppruner.tiny.model import SPECIAL_TOKENS, VISUAL_TOKENS, build_tokenizer
from sppruner.tiny.questions import questions
from sppruner.tiny.scenes import HELD_OUT_SEED, JPEG_QUALITY, sample_scene

__all__ = ["CUES", "KEPT", "cue_scores", "truth_ranks"]

CUES: Final = ("oracle", "relevance", "saliency", "context", "random")
KEPT: Final = (48, 32, 16)
_STOP_WORDS: Final = "a are color colour how is many number of on the there to what where ?".split()
_CPU: Final = torch.device("cpu")


@torch.inference_mode()
def cue_scores(
    family: Family, model: Any, scenes: int, first: int = HELD_OUT_SEED, batch: int = 10
) -> dict[tuple[str, int], dict[str, Score]]:
    """Exact match per kind for every (cue, kept tokens), captions left out; dense is ("all", 144).

    Teacher-forced, which equals greedy decoding.
    """
    cache = scene_table(first, scenes, JPEG_QUALITY)
    scores: dict[tuple[str, int], dict[str, Score]] = defaultdict(lambda: defaultdict(Score))
    generator = torch.Generator().manual_seed(0)
    for start in range(0, scenes, batch):
        rows = np.arange(start, min(start + batch, scenes))
        images = pixels(cache, rows, _CPU)
        tokens_BND, _ = family.eyes(model)(images.to(model.dtype))
        saliency_BN = family.saliency(model, images)[-1]
        groups: list[Array] = []
        owners: list[int] = []
        ranks: dict[str, list[Tensor]] = defaultdict(list)
        for row, index in enumerate(rows):
            scene = sample_scene(first + int(index))
            asked = np.arange(cache.starts[index], cache.starts[index + 1])
            asked = asked[cache.spans[asked, 3] != CAPTION_KIND]
            for number, question in zip(asked, questions(scene), strict=True):
                groups.append(np.array([number]))
                owners.append(row)
                near, around = truth_ranks(cache, int(index), scene, question.about)
                ranks["oracle"].append(near)
                ranks["context"].append(around)
                ranks["relevance"].append(_relevance(model, tokens_BND[row], cache, number))
                ranks["saliency"].append(saliency_BN[row])
                ranks["random"].append(torch.rand(VISUAL_TOKENS, generator=generator))
        text = pack_questions(cache, groups, _CPU)
        visual = tokens_BND[owners]
        for kind, right in graded(answer_logits(family, model, visual, text), text):
            scores["all", VISUAL_TOKENS][kind].add(right)
        for cue in CUES:
            order = torch.stack(ranks[cue]).argsort(dim=1, descending=True, stable=True)
            for kept in KEPT:
                keep = order[:, :kept].sort(1).values
                for kind, right in graded(answer_logits(family, model, visual, text, keep), text):
                    scores[cue, kept][kind].add(right)
    return scores


def truth_ranks(
    cache: SceneCache, index: int, scene: Scene, about: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Two rankings (144,): the named things and then what is near them; only what is near them."""
    names = {item.name: i for i, item in enumerate(scene.objects)}
    names |= {f"{sign.color} sign": SIGNS + i for i, sign in enumerate(scene.signs)}
    grounds = {ground.name: GROUNDS + i for i, ground in enumerate(scene.grounds)}
    asked = [names[name] for name in about if name in names]
    behind = [grounds[name] for name in about if name in grounds]
    owners = cache.owners[index].astype(np.int64)
    centers = cache.centers[index][asked] if asked else np.full((1, 2), 0.5)
    gaps = np.linalg.norm(PATCH_CENTERS[:, None] - centers, axis=2).min(1)
    around = -gaps - 10.0 * (owners < GROUNDS)
    asked_about = np.isin(owners, asked)
    near = -gaps + 10.0 * asked_about + 10.0 * (asked_about & cache.cores[index])
    # Of a ground, the nearest patches: all of it would leave no room for anything else.
    near += 5.0 * np.isin(owners, behind)
    return torch.from_numpy(near), torch.from_numpy(around)


def _relevance(model: Any, tokens_ND: Tensor, cache: SceneCache, question: int) -> Tensor:
    """(144,) best centred cosine to a word of the question."""
    first, length, answer, _ = cache.spans[question]
    ids = [int(i) for i in cache.tokens[first : first + length - answer] if int(i) not in _SKIPPED]
    words_TD = model.get_input_embeddings()(torch.tensor(ids)).float()
    cosine_NT = normalize(tokens_ND.float(), dim=1) @ normalize(words_TD, dim=1).T
    return (cosine_NT - cosine_NT.mean(0)).amax(1)


_SKIPPED: Final = frozenset(
    build_tokenizer().convert_tokens_to_ids([*_STOP_WORDS, *SPECIAL_TOKENS])
)
