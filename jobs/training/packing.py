"""Many questions per image in one sequence: the main economy of the recipe.

Every question sees the image prefix and itself only and restarts its position ids right behind
the image, which is exactly the layout at test time; one vision pass thus serves a dozen answers.
Dropped visual tokens are simply absent, the kept ones keep their original positions.
Shapes: B scenes, N = 144 patches, K kept, T text tokens, S all tokens, D = 128, A answer tokens.
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
    "Pack",
    "answer_logits",
    "lm_loss",
    "pack",
    "pack_questions",
    "random_keep",
    "shown_entities",
]

_ROUND: Final = 16  # text lengths are padded to a multiple, for fewer distinct shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """The text half of a batch; segment 0 is padding, questions count from 1."""

    ids_BT: Tensor
    segments_BT: Tensor
    positions_BT: Tensor  # from 0 for every question
    rows_A: Tensor  # scene of each answer token
    columns_A: Tensor  # text column whose logits predict it
    labels_A: Tensor
    kinds_A: Tensor
    questions_A: Tensor  # running number of the question within the batch
    evidence_A: Tensor  # bits of the entities the question is about


def pack(
    cache: SceneCache,
    scenes: Array,
    rng: np.random.Generator,
    caption_rate: float,
    device: torch.device,
) -> Pack:
    """Tokenized questions of `scenes`; captions are asked with probability `caption_rate`."""
    groups = []
    for scene in scenes:
        asked = np.arange(cache.starts[scene], cache.starts[scene + 1])
        if rng.random() >= caption_rate:
            asked = asked[cache.spans[asked, 3] != CAPTION_KIND]
        groups.append(asked)
    return pack_questions(cache, groups, device)


def pack_questions(cache: SceneCache, groups: Sequence[Array], device: torch.device) -> Pack:
    """One row per group of questions, given as indices into `SceneCache.spans`."""
    texts: list[Array] = []
    answers: list[tuple[int, int, int, int, int, int]] = []
    question = 0
    for row, asked in enumerate(groups):
        parts = []
        column = 0
        about = zip(cache.spans[asked], cache.evidence[asked], strict=True)
        for segment, ((first, length, answer, kind), bits) in enumerate(about, start=1):
            ids = np.asarray(cache.tokens[first : first + length], dtype=np.int64)
            place = np.arange(length)
            parts.append(np.stack([ids, np.full(length, segment), place]))
            for index in range(length - answer, length):
                answers.append((row, column + index - 1, int(ids[index]), kind, question, bits))
            column += length
            question += 1
        texts.append(np.concatenate(parts, axis=1))
    width = -(-max(text.shape[1] for text in texts) // _ROUND) * _ROUND
    padded = np.zeros((len(texts), 3, width), dtype=np.int64)
    for row, text in enumerate(texts):
        padded[row, :, : text.shape[1]] = text
    table = torch.from_numpy(padded).to(device)
    rows, columns, labels, kinds, numbers, bits = torch.tensor(answers, device=device).T
    return Pack(
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


def random_keep(batch: int, kept: int, generator: torch.Generator) -> Tensor:
    """(B, K) sorted indices of uniformly random visual tokens."""
    order = torch.rand(batch, VISUAL_TOKENS, generator=generator).argsort(1)
    return order[:, :kept].sort(1).values


def answer_logits(
    family: Family,
    model: Any,
    visual_BND: Tensor,
    text: Pack,
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
    """(B, 1, S, S) bool: causal, and a question sees only the prefix and itself."""
    segments = nn.functional.pad(segments_BT, (before, 0), value=-1)
    same = segments[:, :, None] == segments[:, None, :]
    same[:, :, :before] = True
    return same.tril()[:, None]


def shown_entities(cache: SceneCache, scenes: Array, keep_BK: Tensor) -> Tensor:
    """(B,) int64 with bit e set where a patch of entity e's core is among the kept tokens."""
    kept_BN = np.zeros((len(scenes), VISUAL_TOKENS), dtype=bool)
    np.put_along_axis(kept_BN, keep_BK.cpu().numpy(), True, axis=1)
    owners_BN = np.asarray(cache.owners[scenes]).astype(np.int64)
    bits_BN = np.where(np.asarray(cache.cores[scenes]) & kept_BN, 1 << owners_BN, 0)
    return torch.from_numpy(np.bitwise_or.reduce(bits_BN, axis=1))


def lm_loss(
    logits_AV: Tensor, text: Pack, kind_weights: Tensor, shown_B: Tensor | None = None
) -> Tensor:
    """Cross-entropy over answer tokens, weighted by the question's kind.

    With `shown_B` (see `shown_entities`), questions about things that no kept token shows count
    nothing: trained to name what it cannot see, a model learns to guess beyond what it sees, and
    then does so too when a pruner has kept every thing.
    """
    weights = kind_weights[text.kinds_A]
    if shown_B is not None:
        shown_A = shown_B.to(text.rows_A.device)[text.rows_A]
        weights = weights * (text.evidence_A & ~shown_A == 0)
    losses = nn.functional.cross_entropy(logits_AV.float(), text.labels_A, reduction="none")
    return (weights * losses).sum() / weights.sum().clamp(min=1.0)
