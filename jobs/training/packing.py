"""Packs many questions per image into one sequence, so that one vision pass serves a dozen answers.

Every question attends to the image prefix and to itself only, and its position ids restart directly
after the image: exactly the layout at inference. Dropped visual tokens are absent; kept ones keep
their positions.
Shapes: B scenes, N = 144 patches, K kept, T text tokens, S all tokens, D = 128, A answer tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from jobs.training.families import Family
from jobs.training.scene_cache import CAPTION_KIND, Array, SceneCache
from sppruner.tiny.model import VISUAL_TOKENS

__all__ = [
    "PackedQuestions",
    "compute_answer_logits",
    "compute_lm_loss",
    "find_shown_entities",
    "pack_questions",
    "pack_scenes",
    "sample_random_keep",
]

_ROUND: Final = 16  # text lengths are padded to a multiple, for fewer distinct shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedQuestions:
    """The text tokens of a batch and the answer tokens among them."""

    ids_BT: Tensor
    """Token ids, padded."""
    segments_BT: Tensor
    """Number of the question in its row, from 1; 0 is padding."""
    positions_BT: Tensor
    """Position within the question, from 0."""
    rows_A: Tensor
    """Row (scene) of each answer token."""
    columns_A: Tensor
    """Text column whose logits predict the answer token."""
    labels_A: Tensor
    """Token id of the answer token."""
    kinds_A: Tensor
    """Kind of the question."""
    questions_A: Tensor
    """Number of the question within the batch, from 0."""
    evidence_A: Tensor
    """Bits of the entities that the question is about."""


def pack_scenes(
    cache: SceneCache,
    scenes: Array,
    rng: np.random.Generator,
    caption_rate: float,
    device: torch.device,
) -> PackedQuestions:
    """Tokenized questions of `scenes`, with captions at probability `caption_rate`."""
    groups = []
    for scene in scenes:
        questions = np.arange(cache.starts[scene], cache.starts[scene + 1])
        if rng.random() >= caption_rate:
            questions = questions[cache.spans[questions, 3] != CAPTION_KIND]
        groups.append(questions)
    return pack_questions(cache, groups, device)


def pack_questions(
    cache: SceneCache, groups: Sequence[Array], device: torch.device
) -> PackedQuestions:
    """One row per group of questions, given as indices into `SceneCache.spans`."""
    texts: list[Array] = []
    answers: list[tuple[int, int, int, int, int, int]] = []
    question = 0
    for row, questions in enumerate(groups):
        pieces = []
        column = 0
        about = zip(cache.spans[questions], cache.evidence[questions], strict=True)
        for segment, ((first, length, answer, kind), bits) in enumerate(about, start=1):
            ids = np.asarray(cache.tokens[first : first + length], dtype=np.int64)
            place = np.arange(length)
            pieces.append(np.stack([ids, np.full(length, segment), place]))
            for index in range(length - answer, length):
                answers.append((row, column + index - 1, int(ids[index]), kind, question, bits))
            column += length
            question += 1
        texts.append(np.concatenate(pieces, axis=1))
    width = -(-max(text.shape[1] for text in texts) // _ROUND) * _ROUND
    padded = np.zeros((len(texts), 3, width), dtype=np.int64)
    for row, text in enumerate(texts):
        padded[row, :, : text.shape[1]] = text
    table = torch.from_numpy(padded).to(device)
    rows, columns, labels, kinds, numbers, bits = torch.tensor(answers, device=device).T
    return PackedQuestions(
        ids_BT=table[:, 0],
        segments_BT=table[:, 1],
        positions_BT=table[:, 2],
        rows_A=rows,
        columns_A=columns,
        labels_A=labels,
        kinds_A=kinds,
        questions_A=numbers,
        evidence_A=bits,
    )


def sample_random_keep(batch: int, kept: int, generator: torch.Generator) -> Tensor:
    """(B, K) sorted indices of uniformly random visual tokens."""
    order = torch.rand(batch, VISUAL_TOKENS, generator=generator).argsort(1)
    return order[:, :kept].sort(1).values


def compute_answer_logits(
    family: Family,
    model: Any,
    visual_BND: Tensor,
    text: PackedQuestions,
    keep_BK: Tensor | None = None,
) -> Tensor:
    """(A, V) logits of every answer token, teacher-forced, from projected visual tokens."""
    batch, device = len(visual_BND), visual_BND.device
    if keep_BK is None:
        keep_BK = torch.arange(VISUAL_TOKENS, device=device).expand(batch, -1)
    keep_BK = keep_BK.to(device)
    visual = visual_BND.gather(1, keep_BK[..., None].expand(-1, -1, visual_BND.shape[-1]))
    embed: nn.Embedding = model.get_input_embeddings()
    start, end = (
        embed(torch.tensor(ids, dtype=torch.long, device=device)).expand(batch, -1, -1)
        for ids in (family.before, family.after)
    )
    before = start.shape[1] + keep_BK.shape[1] + end.shape[1]
    hidden_BSD = model.model.language_model(
        inputs_embeds=torch.cat([start, visual, end, embed(text.ids_BT)], 1),
        attention_mask=_block_mask(text.segments_BT, before),
        position_ids=family.positions(keep_BK, text.positions_BT),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden_BSD[text.rows_A, before + text.columns_A])


def _block_mask(segments_BT: Tensor, before: int) -> Tensor:
    """(B, 1, S, S) bool: causal; a question attends to the prefix and itself only."""
    segments = nn.functional.pad(segments_BT, (before, 0), value=-1)
    same = segments[:, :, None] == segments[:, None, :]
    same[:, :, :before] = True
    return same.tril()[:, None]


def find_shown_entities(cache: SceneCache, scenes: Array, keep_BK: Tensor) -> Tensor:
    """(B,) int64 with bit e set if a patch of entity e's core is among the kept tokens."""
    kept_BN = np.zeros((len(scenes), VISUAL_TOKENS), dtype=bool)
    np.put_along_axis(kept_BN, keep_BK.cpu().numpy(), True, axis=1)
    owners_BN = np.asarray(cache.owners[scenes]).astype(np.int64)
    bits_BN = np.where(np.asarray(cache.cores[scenes]) & kept_BN, 1 << owners_BN, 0)
    return torch.from_numpy(np.bitwise_or.reduce(bits_BN, axis=1))


def compute_lm_loss(
    logits_AV: Tensor, text: PackedQuestions, kind_weights: Tensor, shown_B: Tensor | None = None
) -> Tensor:
    """Cross-entropy over answer tokens, weighted by the question's kind.

    With `shown_B` (see `find_shown_entities`), questions about entities that no kept token shows
    have weight 0: a model that is trained to name them learns to guess, and then guesses even when
    a pruner has kept every entity.
    """
    weights = kind_weights[text.kinds_A]
    if shown_B is not None:
        shown_A = shown_B.to(text.rows_A.device)[text.rows_A]
        weights = weights * (text.evidence_A & ~shown_A == 0)
    losses = nn.functional.cross_entropy(logits_AV.float(), text.labels_A, reduction="none")
    return (weights * losses).sum() / weights.sum().clamp(min=1.0)
