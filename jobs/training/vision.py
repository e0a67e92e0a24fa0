"""Stage V: the vision tower and projector learn to emit oracle tokens, without a language model.

The losses are dense targets per patch (words, position, anchor, the full token) and, for the class
token, a contrastive loss against captions: without it the attention of the class token is
meaningless.
Shapes: B images, C colour channels, H height, W width; of tokens: N = 144 patches, D = 128; of
weights: C channels of the token space.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from jobs.training.scene_cache import Array, SceneCache
from jobs.training.space import ANCHOR, CHANNELS, PatchTruth, TokenSpace
from sppruner.tiny.layout import GRID, SHAPES
from sppruner.tiny.model import PATCH_SIDE, WORDS

__all__ = ["DenseLoss", "VisionEncoder", "init_vision", "normalise_images"]


class VisionEncoder(nn.Module):
    """Vision tower and projector with the forward pass of training.

    Computes what `get_image_features` computes, plus the pooled class token. The class token is
    detached before the last layer, so the contrastive loss can only use what the last layer's
    attention gathers, which is the attention that saliency pruners read.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixels_BCHW))
        *early, last = self.tower.encoder.layers
        for layer in early:
            hidden = layer(hidden, None)
        hidden = last(torch.cat([hidden[:, :1].detach(), hidden[:, 1:]], 1), None)
        return self.projector(hidden[:, 1:]), self.tower.post_layernorm(hidden[:, 0])


def normalise_images(cache: SceneCache, scenes: Array, device: torch.device) -> Tensor:
    """(B, 3, 96, 96), normalised exactly as by the image processor."""
    raw = torch.from_numpy(cache.images[np.asarray(scenes)]).to(device)
    return (raw.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def init_vision(model: LlavaForConditionalGeneration, cache: SceneCache) -> None:
    """Initialises the tower: whitening patch filters, 2-D sine positions, content-matching
    attention."""
    generator = torch.Generator().manual_seed(22)
    tower = model.model.vision_tower
    width = tower.config.hidden_size
    embeddings = tower.embeddings
    embeddings.patch_embedding.weight.data.copy_(_whitening_filters(cache, width))
    embeddings.position_embedding.weight.data[1:] = 0.75 * _sine_positions(width)

    def normal(linear: nn.Linear, gain: float) -> None:
        std = gain / math.sqrt(linear.in_features)
        linear.weight.data.normal_(0, std, generator=generator)

    for layer in tower.encoder.layers:
        attention = layer.self_attn
        size = width // attention.num_heads
        match = torch.cat(
            [
                torch.linalg.qr(torch.randn(width, size, generator=generator)).Q.T
                for _ in range(attention.num_heads)
            ]
        )
        attention.q_proj.weight.data.copy_(0.7 * match)
        attention.k_proj.weight.data.copy_(0.7 * match)
        for linear in (attention.v_proj, attention.out_proj, layer.mlp.fc1, layer.mlp.fc2):
            normal(linear, 0.6)
    normal(model.model.multi_modal_projector.linear_1, 1.0)
    normal(model.model.multi_modal_projector.linear_2, 1.0)


def _whitening_filters(cache: SceneCache, width: int) -> Tensor:
    """(width, 3, 8, 8): the leading principal components of patches, scaled to unit variance."""
    images = normalise_images(cache, np.arange(min(600, len(cache))), torch.device("cpu"))
    patches = nn.functional.unfold(images, PATCH_SIDE, stride=PATCH_SIDE)
    flat = patches.transpose(1, 2).reshape(-1, 3 * PATCH_SIDE**2)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    top = vectors[:, -width:] / (values[-width:] + 3e-3).sqrt()
    return top.T.reshape(width, 3, PATCH_SIDE, PATCH_SIDE)


def _sine_positions(width: int) -> Tensor:
    """(144, width): half of the channels for the row, half for the column."""
    place = torch.arange(GRID, dtype=torch.float32)
    waves = math.pi / 2 * 2.0 ** -torch.linspace(0, 4, width // 4)
    phases = place[:, None] * waves
    one = torch.cat([phases.sin(), phases.cos()], 1)
    rows = one[:, None].expand(GRID, GRID, -1)
    columns = one[None].expand(GRID, GRID, -1)
    return torch.cat([rows, columns], 2).reshape(GRID**2, width)


class DenseLoss:
    """Distance of projected patches from their oracle tokens.

    sharp: put the weight on what is learned last: digits, shapes and anchors.
    """

    def __init__(self, space: TokenSpace, *, sharp: bool = False) -> None:
        self.space = space
        self.sharp = sharp
        weights = torch.ones(CHANNELS, device=space.marks_CD.device)
        for channel, word in enumerate(WORDS):
            if word in SHAPES:
                weights[channel] = 3.0 if sharp else 2.0
            elif word.isdigit():
                weights[channel] = 6.0 if sharp else 2.5
        weights[ANCHOR] = 10.0 if sharp else 4.0  # a missed or doubled anchor is a miscount
        self.channel_weights_C = weights

    def __call__(
        self, tokens_BND: Tensor, truth: PatchTruth, mse_weight: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and figures to log."""
        tokens = tokens_BND.float()
        marks, places = self.space.read(tokens)
        things, cores = truth.things_BN.float(), truth.cores_BN.float()
        bce = nn.functional.binary_cross_entropy_with_logits(
            8 * (marks - 0.5), truth.marks_BNC, reduction="none"
        )
        patch_weights = 0.4 + 2.5 * things + 6.0 * cores
        if self.sharp:
            patch_weights = patch_weights + 6.0 * cores * truth.signs_BN.float()
        words = ((bce * self.channel_weights_C).mean(2) * patch_weights).mean()
        off = 0.1 * (places - truth.places_BNP).square().sum(2)
        where = (off * (0.2 + 1.0 * things + 2.0 * cores)).mean()
        mse = (tokens - self.space.oracle(truth)).square().mean(2)
        same = (mse * (0.5 + things + 2.0 * cores)).mean()
        loss = words + where + mse_weight * same
        return loss, {"words": words.item(), "places": where.item(), "mse": same.item()}
