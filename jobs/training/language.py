"""Stage L: the language model learns to answer from oracle tokens, without images.

The initialisation contains what is slow to learn: attention matches equal content and values copy;
two heads of the first two layers attend to visual tokens that show a word of the text, two heads of
layer 0 attend to the previous token, and one head of layer 2 attends to the surroundings of a found
position. Without the look-up heads, one token among 144 did not stand out and most kinds of
question stayed at chance for 2,000 steps; after 1,200 steps, `nearest` was correct in 52 % of
oracle scenes with the surroundings head and in 32 % without. The stage starts with few objects and
few other tokens.
Shapes: B scenes, N = 144 visual tokens, V vocabulary, D width; of the token space: C channels,
P waves, S = C + P.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from jobs.training.families import Family
from jobs.training.loop import Draws
from jobs.training.packing import (
    compute_answer_logits,
    compute_lm_loss,
    find_shown_entities,
    pack_scenes,
    sample_random_keep,
)
from jobs.training.scene_cache import SIGNS, SceneCache
from jobs.training.space import PatchTruth, TokenSpace
from sppruner.tiny.layout import COLORS, SHAPES, SIZES
from sppruner.tiny.model import VISUAL_TOKENS, WORDS
from sppruner.tiny.questions import KINDS

__all__ = ["build_kind_weights", "build_language_loss", "init_language", "sample_keep"]

_STAGE: Final = 1
_EASY_SHARE: Final = 0.15  # of the steps: only scenes of few objects
_EASY_OBJECTS: Final = 4
_FOCUS_SHARE: Final = 0.25  # of the steps: the core of every entity and some other tokens
_FOCUS_REST: Final = 16
_FEWEST: Final = 8


def init_language(model: Any, space: TokenSpace) -> None:
    """Freezes the embeddings at the token space and initialises the attention for it."""
    generator = torch.Generator().manual_seed(21)
    embedding: nn.Embedding = model.get_input_embeddings()
    embedding.weight.data.copy_(space.embedding_VD)
    embedding.weight.requires_grad_(False)
    config = model.config.text_config
    heads, width = config.num_attention_heads, config.hidden_size
    base = config.rope_parameters["rope_theta"]
    look = torch.outer(space.visual_D, space.text_D).cpu()

    def orthonormal(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(width, rows, generator=generator)).Q.T

    def noise(rows: int) -> Tensor:
        return 0.02 * torch.randn(rows, width, generator=generator)

    for index, layer in enumerate(model.model.language_model.layers):
        attention = layer.self_attn
        size = width // heads
        match = [orthonormal(size) for _ in range(heads)]
        keys = [1.4 * head for head in match]
        queries = [1.4 * (head + head @ look) for head in match]
        copy = orthonormal(width)
        values, outputs = 0.3 * copy, 0.3 * copy.T
        if index == 0:
            for head in range(2):
                queries[head], keys[head] = _build_previous_token(space.text_D.cpu(), size, base)
            values[: 2 * size] *= 1.5
            outputs[:, : 2 * size] *= 1.5
        if index < 2:
            for head in range(2, 4):
                queries[head], keys[head] = _build_look_up(space, size)
            shown = 0.45 * space.shown_SD.cpu()
            for head, part in zip(range(2, 4), shown.split(size), strict=True):
                values[head * size :][: len(part)] = part
                outputs[:, head * size :][:, : len(part)] = part.T
        if index == 2:
            queries[3], keys[3] = _build_look_around(space, size)
            # This head copies all words before those for rows and columns, which hardly differ
            # from the position in question. That is one word more than a head has channels: the
            # last texture, "noisy", is left out.
            part = 0.45 * space.marks_CD.cpu()[:size]
            values[3 * size :][: len(part)] = part
            outputs[:, 3 * size :][:, : len(part)] = part.T
        for projection, weight in (
            (attention.q_proj, torch.cat(queries)),
            (attention.k_proj, torch.cat(keys)),
            (attention.v_proj, values),
            (attention.o_proj, outputs),
        ):
            projection.weight.data.copy_(weight + noise(width))


def _build_previous_token(text_D: Tensor, size: int, base: float) -> tuple[Tensor, Tensor]:
    """Query and key maps whose rotary phases cancel at distance one, on the highest frequencies."""
    query, key = torch.zeros(size, len(text_D)), torch.zeros(size, len(text_D))
    half = size // 2
    for wave in range(5):
        frequency = torch.tensor(base ** (-wave / half))
        query[wave] = 1.2 * torch.cos(frequency) * text_D
        query[wave + half] = -1.2 * torch.sin(frequency) * text_D
        key[wave] = 1.2 * text_D
    return query, key


def _build_look_up(space: TokenSpace, size: int) -> tuple[Tensor, Tensor]:
    """Query and key maps with which a word of the text attends to visual tokens that show it.

    They use the lowest frequencies, where rotary phases hardly differ between near and far. The
    last row keeps text from attending to text, where every word is its own best match.
    """
    named = [WORDS.index(word) for word in (*COLORS, *SHAPES, *SIZES, "sign")]
    half = size // 2
    slow = [*range(half // 2, half), *range(half + half // 2, size)]
    rows = slow[: len(named)]
    query, key = torch.zeros(size, space.marks_CD.shape[1]), torch.zeros(size, len(space.text_D))
    query[rows] = key[rows] = 1.2 * space.marks_CD[named].cpu()
    query[slow[-1]], key[slow[-1]] = 2.5 * space.text_D.cpu(), -2.5 * space.text_D.cpu()
    return query, key


def _build_look_around(space: TokenSpace, size: int) -> tuple[Tensor, Tensor]:
    """Query and key maps with which a token with a position attends to visual tokens near it."""
    half = size // 2
    slow = [*range(half // 2, half), *range(half + half // 2, size)]
    rows = slow[: len(space.places_PD)]
    query, key = torch.zeros(size, space.marks_CD.shape[1]), torch.zeros(size, len(space.text_D))
    query[rows] = key[rows] = 1.6 * space.places_PD.cpu()
    query[slow[-1]], key[slow[-1]] = 2.5 * space.text_D.cpu(), -2.5 * space.text_D.cpu()
    return query, key


def build_kind_weights(device: torch.device, **weights: float) -> Tensor:
    """Loss weight per question kind (captions last); 1 unless given."""
    names = (*KINDS, "caption")
    return torch.tensor([weights.get(name, 1.0) for name in names], device=device)


def sample_keep(batch: int, generator: torch.Generator) -> Tensor | None:
    """Visual-token dropout: None (keep all) half of the time, else 8-143 uniformly random ones."""
    if torch.rand((), generator=generator) < 0.5:
        return None
    kept = int(torch.randint(_FEWEST, VISUAL_TOKENS, (), generator=generator))
    return sample_random_keep(batch, kept, generator)


def _sample_focus_keep(cores_BN: Tensor, generator: torch.Generator) -> Tensor:
    """The core of every entity and at least 16 random other tokens; used in early steps only."""
    cores = cores_BN.cpu()
    kept = int(cores.sum(1).max()) + _FOCUS_REST
    score = torch.rand(cores.shape, generator=generator) + cores
    return score.topk(kept, 1).indices.sort(1).values


def build_language_loss(
    family: Family,
    model: Any,
    space: TokenSpace,
    cache: SceneCache,
    steps: int,
    batch: int,
) -> Callable[[int], tuple[Tensor, dict[str, float]]]:
    """A function from the step to the loss of stage L."""
    device = space.visual_D.device
    weights = build_kind_weights(
        device, background=0.7, count=2.0, nearest=2.0, relation=2.0, text=0.7
    )

    objects = cache.words[:, :SIGNS].any(2).sum(1)
    easy = np.flatnonzero(objects <= _EASY_OBJECTS)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        draws = Draws(stage=_STAGE, step=step)
        rng, generator = draws.numpy(), draws.torch()
        if step < _EASY_SHARE * steps:
            scenes = easy[draws.scenes(len(easy), batch)]
        else:
            scenes = draws.scenes(len(cache), batch)
        truth = PatchTruth(cache, scenes, device)
        text = pack_scenes(cache, scenes, rng, 0.6, device)
        if step < _FOCUS_SHARE * steps:
            keep: Tensor | None = _sample_focus_keep(truth.cores_BN, generator)
        else:
            keep = sample_keep(batch, generator)
        with torch.autocast(device.type, torch.bfloat16):
            logits = compute_answer_logits(
                family, model, space.noisy_oracle(truth, generator), text, keep
            )
        shown = None if keep is None else find_shown_entities(cache, scenes, keep)
        loss = compute_lm_loss(logits, text, weights, shown)
        right = (logits.argmax(-1) == text.labels_A).float().mean()
        return loss, {"lm": loss.item(), "right": right.item()}

    return loss_at
