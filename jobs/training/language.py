"""Stage L: the language model learns to answer from oracle tokens, without any image.

Its initialisation knows what is slow to discover: attention matches equal content and values copy;
two heads of the first layers look up the visual tokens that show a word of the text, and two heads
of layer 0 look at the previous token; a head of the third looks around the place of what was found.
Without the look-up, one token among 144 did not stand out and most kinds of question stayed at
chance for 2,000 steps; with 1,200 steps, what is nearest was answered in 52 % of oracle scenes with
looking around and in 32 % without. The stage begins with few objects and few other tokens.
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
    answer_logits,
    lm_loss,
    pack,
    random_keep,
    shown_entities,
)
from jobs.training.scene_cache import SIGNS, SceneCache
from jobs.training.space import TokenSpace, Truth
from sppruner.tiny.layout import COLORS, SHAPES, SIZES
from sppruner.tiny.model import VISUAL_TOKENS, WORDS
from sppruner.tiny.questions import KINDS

__all__ = ["init_language", "kind_weights", "language_loss", "sample_keep"]

_STAGE: Final = 1
_EASY_SHARE: Final = 0.15  # of the steps: only scenes of few objects
_EASY_OBJECTS: Final = 4
_FOCUS_SHARE: Final = 0.25  # of the steps: the core of every thing and some other tokens
_FOCUS_REST: Final = 16
_FEWEST: Final = 8


def init_language(model: Any, space: TokenSpace) -> None:
    """Freeze the embeddings at the token space and initialise the attention around it."""
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
                queries[head], keys[head] = _previous_token(space.text_D.cpu(), size, base)
            values[: 2 * size] *= 1.5
            outputs[:, : 2 * size] *= 1.5
        if index < 2:
            for head in range(2, 4):
                queries[head], keys[head] = _look_up(space, size)
            shown = 0.45 * space.shown_SD.cpu()
            for head, part in zip(range(2, 4), shown.split(size), strict=True):
                values[head * size :][: len(part)] = part
                outputs[:, head * size :][:, : len(part)] = part.T
        if index == 2:
            queries[3], keys[3] = _look_around(space, size)
            # It tells what stands near, in all words before those for rows and columns, which
            # hardly differ from the place looked around. That is one word more than a head has
            # channels: the last texture, "noisy", is left out.
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


def _previous_token(text_D: Tensor, size: int, base: float) -> tuple[Tensor, Tensor]:
    """Query and key maps whose rotary phases cancel at distance one, on the fastest waves."""
    query, key = torch.zeros(size, len(text_D)), torch.zeros(size, len(text_D))
    half = size // 2
    for wave in range(5):
        frequency = torch.tensor(base ** (-wave / half))
        query[wave] = 1.2 * torch.cos(frequency) * text_D
        query[wave + half] = -1.2 * torch.sin(frequency) * text_D
        key[wave] = 1.2 * text_D
    return query, key


def _look_up(space: TokenSpace, size: int) -> tuple[Tensor, Tensor]:
    """Query and key maps by which a word of the text finds the visual tokens that show it.

    On the slowest waves, where rotary phases hardly differ between near and far. The last row
    keeps text from looking at text, where every word is its own best match.
    """
    named = [WORDS.index(word) for word in (*COLORS, *SHAPES, *SIZES, "sign")]
    half = size // 2
    slow = [*range(half // 2, half), *range(half + half // 2, size)]
    rows = slow[: len(named)]
    query, key = torch.zeros(size, space.marks_CD.shape[1]), torch.zeros(size, len(space.text_D))
    query[rows] = key[rows] = 1.2 * space.marks_CD[named].cpu()
    query[slow[-1]], key[slow[-1]] = 2.5 * space.text_D.cpu(), -2.5 * space.text_D.cpu()
    return query, key


def _look_around(space: TokenSpace, size: int) -> tuple[Tensor, Tensor]:
    """Query and key maps by which a token that knows a place finds visual tokens near it."""
    half = size // 2
    slow = [*range(half // 2, half), *range(half + half // 2, size)]
    rows = slow[: len(space.places_PD)]
    query, key = torch.zeros(size, space.marks_CD.shape[1]), torch.zeros(size, len(space.text_D))
    query[rows] = key[rows] = 1.6 * space.places_PD.cpu()
    query[slow[-1]], key[slow[-1]] = 2.5 * space.text_D.cpu(), -2.5 * space.text_D.cpu()
    return query, key


def kind_weights(device: torch.device, **weights: float) -> Tensor:
    """Loss weight per question kind (captions last), 1 unless named."""
    names = (*KINDS, "caption")
    return torch.tensor([weights.get(name, 1.0) for name in names], device=device)


def sample_keep(batch: int, generator: torch.Generator) -> Tensor | None:
    """Unbiased visual-token dropout: all tokens half of the time, else 8-143 uniformly random."""
    if torch.rand((), generator=generator) < 0.5:
        return None
    kept = int(torch.randint(_FEWEST, VISUAL_TOKENS, (), generator=generator))
    return random_keep(batch, kept, generator)


def _focus_keep(cores_BN: Tensor, generator: torch.Generator) -> Tensor:
    """The core of every thing and at least 16 random other tokens. Early steps only."""
    cores = cores_BN.cpu()
    kept = int(cores.sum(1).max()) + _FOCUS_REST
    score = torch.rand(cores.shape, generator=generator) + cores
    return score.topk(kept, 1).indices.sort(1).values


def language_loss(
    family: Family,
    model: Any,
    space: TokenSpace,
    cache: SceneCache,
    steps: int,
    batch: int,
) -> Callable[[int], tuple[Tensor, dict[str, float]]]:
    """The loss of stage L as a function of the step."""
    device = space.visual_D.device
    weights = kind_weights(device, background=0.7, count=2.0, nearest=2.0, relation=2.0, text=0.7)

    objects = cache.words[:, :SIGNS].any(2).sum(1)
    easy = np.flatnonzero(objects <= _EASY_OBJECTS)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        draws = Draws(stage=_STAGE, step=step)
        rng, generator = draws.numpy(), draws.torch()
        if step < _EASY_SHARE * steps:
            scenes = easy[draws.scenes(len(easy), batch)]
        else:
            scenes = draws.scenes(len(cache), batch)
        truth = Truth(cache, scenes, device)
        text = pack(cache, scenes, rng, 0.6, device)
        if step < _FOCUS_SHARE * steps:
            keep: Tensor | None = _focus_keep(truth.cores_BN, generator)
        else:
            keep = sample_keep(batch, generator)
        with torch.autocast(device.type, torch.bfloat16):
            logits = answer_logits(family, model, space.noisy_oracle(truth, generator), text, keep)
        shown = None if keep is None else shown_entities(cache, scenes, keep)
        loss = lm_loss(logits, text, weights, shown)
        right = (logits.argmax(-1) == text.labels_A).float().mean()
        return loss, {"lm": loss.item(), "right": right.item()}

    return loss_at
