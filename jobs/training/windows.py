"""The Qwen2.5-VL vision tower with the forward pass of training: batched and compilable.

transformers packs all images into one sequence and attends window by window in a Python loop.
Images of one size have the same windows, so here they are one batched attention.
Shapes: B images, C colour channels, H height, W width; P patches of 4 px in merge order, N = P / 4
visual tokens, V tower width; of a layout: W windows of S slots; 2: row and column.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from jobs.training.scene_cache import SceneCache
from jobs.training.vision import normalise_images
from sppruner.tiny.qwen import MERGE

__all__ = ["WindowVisionEncoder", "init_windows", "patchify"]

_UNIT = MERGE**2


def patchify(images_BCHW: Tensor, side: int) -> Tensor:
    """(B, P, C * 2 * side * side): patches in merge order, repeated in time, as the image
    processor writes them."""
    batch, channels, height, width = images_BCHW.shape
    block = side * MERGE
    cut = images_BCHW.reshape(
        batch, channels, height // block, MERGE, side, width // block, MERGE, side
    )
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # B, rows, columns, y, x of the unit, C, side, side
    cut = cut.unsqueeze(6).expand(*cut.shape[:6], 2, *cut.shape[6:])
    return cut.reshape(batch, height * width // side**2, -1)


class _Layout(NamedTuple):
    """Geometry of one image size."""

    places_P2: Tensor
    """Row and column of each patch, for rotary embeddings."""
    slots_WS: Tensor
    """Patch in each slot; empty slots repeat patch 0."""
    filled_WS: Tensor | None
    """Whether a slot has a patch; None if all have."""
    slot_P: Tensor
    """Index of each patch among the W * S slots."""


@torch.compiler.disable
@lru_cache(maxsize=16)
def _build_layout(rows: int, columns: int, window: int) -> _Layout:
    """Layout of `rows` x `columns` merged tokens with windows of `window` x `window` tokens."""
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    inner = torch.cartesian_prod(torch.arange(MERGE), torch.arange(MERGE))
    places = (cells[:, None] * MERGE + inner).reshape(-1, 2)
    across = -(-columns // window)
    home_N = (cells[:, 0] // window) * across + cells[:, 1] // window
    size = window**2 * _UNIT
    count = int(home_N.max()) + 1
    slots = torch.zeros(count, size, dtype=torch.long)
    filled = torch.zeros(count, size, dtype=torch.bool)
    slot = torch.empty(len(places), dtype=torch.long)
    home_P = home_N.repeat_interleave(_UNIT)
    for index in range(count):
        members = (home_P == index).nonzero()[:, 0]
        slots[index, : len(members)] = members
        filled[index, : len(members)] = True
        slot[members] = index * size + torch.arange(len(members))
    return _Layout(places, slots, None if bool(filled.all()) else filled, slot)


class WindowVisionEncoder(nn.Module):
    """Vision tower and merger, plus a pooled vector for the contrastive loss.

    The tower has no class token. The pooled vector is the mean output of the last block's attention
    on detached inputs, so the contrastive loss can only use what that attention gathers, which is
    the attention that saliency pruners read.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.visual

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, D) visual tokens in raster order and (B, V) pooled vectors."""
        tower = self.tower
        hidden, layout, waves = self._embed(images_BCHW)
        for index, block in enumerate(tower.blocks):
            whole = index in tower.fullatt_block_indexes
            normed = block.norm1(hidden)
            if index == len(tower.blocks) - 1:
                cut = block.norm1(hidden.detach())
                pooled = self._attend(block.attn, cut, waves, None).mean(1)
            hidden = hidden + self._attend(block.attn, normed, waves, None if whole else layout)
            hidden = hidden + block.mlp(block.norm2(hidden))
        batch, patches, _ = hidden.shape
        tokens = tower.merger(hidden).reshape(batch, patches // _UNIT, -1)
        return tokens, pooled

    @torch.no_grad()
    def received_attention(self, images_BCHW: Tensor) -> Tensor:
        """(B, N) attention each token receives in the last block, mean over heads and queries."""
        tower = self.tower
        hidden, layout, waves = self._embed(images_BCHW)
        *early, last = tower.blocks
        for index, block in enumerate(early):
            windows = None if index in tower.fullatt_block_indexes else layout
            hidden = hidden + self._attend(block.attn, block.norm1(hidden), waves, windows)
            hidden = hidden + block.mlp(block.norm2(hidden))
        query, key, _ = self._qkv(last.attn, last.norm1(hidden), waves)
        scores = (query @ key.transpose(2, 3)).float() * last.attn.scaling
        received_BP = scores.softmax(3).mean((1, 2))
        return received_BP.reshape(len(hidden), -1, _UNIT).mean(2)

    def _embed(self, images_BCHW: Tensor) -> tuple[Tensor, _Layout, tuple[Tensor, Tensor]]:
        tower = self.tower
        unit = tower.patch_size * MERGE
        layout = _build_layout(
            images_BCHW.shape[2] // unit, images_BCHW.shape[3] // unit, tower.window_size // unit
        )
        patches = patchify(images_BCHW, tower.patch_size)
        hidden = patches @ tower.patch_embed.proj.weight.flatten(1).T.to(patches.dtype)
        waves = tower.rotary_pos_emb(hidden, layout.places_P2.to(hidden.device))
        return hidden, layout, waves

    def _qkv(
        self, attention: Any, normed_BPV: Tensor, waves: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, patches, _ = normed_BPV.shape
        split = attention.qkv(normed_BPV).reshape(batch, patches, 3, attention.num_heads, -1)
        query, key, value = split.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, *waves)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _attend(
        self,
        attention: Any,
        normed_BPV: Tensor,
        waves: tuple[Tensor, Tensor],
        windows: _Layout | None,
    ) -> Tensor:
        query, key, value = self._qkv(attention, normed_BPV, waves)
        scale = attention.scaling
        if windows is None:
            mixed = scaled_dot_product_attention(query, key, value, scale=scale)
        else:
            batch, heads, _, width = query.shape
            count, size = windows.slots_WS.shape
            flat = windows.slots_WS.reshape(-1).to(normed_BPV.device)

            def cut(part: Tensor) -> Tensor:
                slots = part[:, :, flat].reshape(batch, heads, count, size, width)
                return slots.transpose(1, 2).flatten(0, 1)

            mask = None
            if windows.filled_WS is not None:
                filled = windows.filled_WS.to(normed_BPV.device)
                mask = filled.repeat(batch, 1)[:, None, None]
            mixed = scaled_dot_product_attention(
                cut(query), cut(key), cut(value), attn_mask=mask, scale=scale
            )
            mixed = mixed.reshape(batch, count, heads, size, width).transpose(1, 2).flatten(2, 3)
            mixed = mixed[:, :, windows.slot_P.to(normed_BPV.device)]
        return attention.proj(mixed.transpose(1, 2).flatten(2))


def init_windows(model: Qwen2_5_VLForConditionalGeneration, cache: SceneCache) -> None:
    """Initialises the tower like the CLIP tower: whitening filters, content-matching attention."""
    generator = torch.Generator().manual_seed(22)
    tower = model.model.visual
    width, side = tower.patch_embed.embed_dim, tower.patch_size
    images = normalise_images(cache, np.arange(min(600, len(cache))), torch.device("cpu"))
    flat = patchify(images, side).reshape(-1, 3, 2, side * side)[:, :, 0].flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    whitening = (vectors / (values + 3e-3).sqrt()).T
    # There are fewer components than channels: the other filters are mixtures of them.
    mixed = torch.randn(width - len(whitening), len(whitening), generator=generator)
    filters = torch.cat([whitening, mixed @ whitening / len(whitening) ** 0.5])
    filters = filters.reshape(width, 3, 1, side, side).expand(-1, -1, 2, -1, -1) / 2
    tower.patch_embed.proj.weight.data.copy_(filters)

    def normal(linear: nn.Linear, gain: float) -> None:
        std = gain / linear.in_features**0.5
        linear.weight.data.normal_(0, std, generator=generator)

    for block in tower.blocks:
        size = width // block.attn.num_heads
        match = torch.cat(
            [
                torch.linalg.qr(torch.randn(width, size, generator=generator)).Q.T
                for _ in range(block.attn.num_heads)
            ]
        )
        normal(block.attn.qkv, 0.6)
        block.attn.qkv.weight.data[: 2 * width] = 0.7 * torch.cat([match, match])
        for linear in (
            block.attn.proj,
            block.mlp.gate_proj,
            block.mlp.up_proj,
            block.mlp.down_proj,
        ):
            normal(linear, 0.6)
    normal(tower.merger.mlp[0], 1.0)
    normal(tower.merger.mlp[2], 1.0)
