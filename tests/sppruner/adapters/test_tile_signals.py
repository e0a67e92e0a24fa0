"""Saliency and keys of tiled families equal the eager attention maps, mapped from patches to tokens
by 2×2 merging, unpadding and bilinear pooling, each reimplemented here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sppruner.adapters import adapter_for
from sppruner.adapters.tiles import average_patch_signal, group_patches
from sppruner.signals import ATTENTION, CLS_ATTENTION, KEYS, RECEIVED_ATTENTION
from sppruner.types import VisualTokens
from tests.sppruner.families import FAMILIES, llava_next, llava_onevision
from tests.sppruner.families.idefics3 import TILES as IDEFICS3_TILES
from tests.sppruner.families.internvl import TILES as INTERNVL_TILES

MIXED = [1, 2, 0, 1]
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def real_tiles(inputs: dict[str, Tensor]) -> Tensor:
    """[T, 3, H, W]: the tiles of a batch without padding tiles."""
    pixels = inputs["pixel_values"]
    tiles = pixels.flatten(0, 1) if pixels.dim() == 5 else pixels
    return torch.stack([tile for tile in tiles if tile.abs().sum() > 0])


def eager_map(family: str, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """[T, N, N]: the head-mean attention of a layer of the eager tower, tile by tile."""
    model = FAMILIES[family].build("eager").model
    tower = model.vision_model if hasattr(model, "vision_model") else model.vision_tower
    return tower(real_tiles(inputs), output_attentions=True).attentions[layer].mean(dim=1)


def planes_of(family: str, attention: str, inputs: dict[str, Tensor]) -> list[list[VisualTokens]]:
    """The planes of each image of a batch, with every signal."""
    adapter = adapter_for(FAMILIES[family].build(attention))
    encoded = adapter.encode(inputs, adapter.capabilities.signals)
    return [list(image.planes) for image in encoded.images]


def close(found: Tensor, expected: Tensor, rtol: float = 0) -> None:
    torch.testing.assert_close(found, expected, atol=2e-6 + rtol, rtol=rtol)


def mean_of_two_by_two(patches_P: Tensor) -> Tensor:
    """Each token's mean over the patches below it."""
    side = math.isqrt(len(patches_P))
    tokens = []
    for row in range(0, side, 2):
        for column in range(0, side, 2):
            block = [patches_P[(row + r) * side + column + c] for r in (0, 1) for c in (0, 1)]
            tokens.append(torch.stack(block).mean(dim=0))
    return torch.stack(tokens)


@attentions
@torch.no_grad()
def test_internvl_reads_the_cls_row_of_every_tile(attention: str) -> None:
    inputs = FAMILIES["internvl"].batch(MIXED)
    rows_TP = eager_map("internvl", inputs, -1)[:, 0, 1:]
    images = planes_of("internvl", attention, inputs)
    assert [len(planes) for planes in images] == [*INTERNVL_TILES, INTERNVL_TILES[0]]
    planes = [plane for image in images for plane in image]
    for plane, row_P in zip(planes, rows_TP, strict=True):
        close(plane.signals[CLS_ATTENTION], mean_of_two_by_two(row_P))
        assert plane.signals[ATTENTION].equal(plane.signals[CLS_ATTENTION])


@attentions
@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
@torch.no_grad()
def test_idefics3_reads_the_attention_each_patch_of_a_tile_receives(
    family: str, attention: str
) -> None:
    inputs = FAMILIES[family].batch(MIXED)
    received_TP = eager_map(family, inputs, -1).mean(dim=1)
    images = planes_of(family, attention, inputs)
    assert [len(planes) for planes in images] == IDEFICS3_TILES * 2
    planes = [plane for image in images for plane in image]
    for plane, received_P in zip(planes, received_TP, strict=True):
        close(plane.signals[RECEIVED_ATTENTION], mean_of_two_by_two(received_P))
        assert plane.signals[ATTENTION].equal(plane.signals[RECEIVED_ATTENTION])


@attentions
@torch.no_grad()
def test_patches_of_a_tile_that_are_masked_receive_no_attention(attention: str) -> None:
    inputs = FAMILIES["idefics3"].batch([1, 1])
    inputs["pixel_attention_mask"][0, 0, :, 16:] = 0
    (plane, *_), _ = planes_of("idefics3", attention, inputs)
    model = FAMILIES["idefics3"].build("eager").model
    mask_TRC = torch.ones(len(real_tiles(inputs)), 8, 8, dtype=torch.bool)
    mask_TRC[0, :, 4:] = False
    output = model.vision_model(
        real_tiles(inputs), patch_attention_mask=mask_TRC, output_attentions=True
    )
    received_P = output.attentions[-1].mean(dim=1)[0].mean(dim=0)
    close(plane.signals[RECEIVED_ATTENTION], mean_of_two_by_two(received_P))
    right = plane.signals[RECEIVED_ATTENTION].view(4, 4)[:, 2:]
    assert right.abs().max() < 1e-6


def at(tiles_TPC: Tensor, grid: tuple[int, int], row: int, column: int) -> Tensor:
    """The value of a patch by its place on the padded grid of high-resolution tiles."""
    side = math.isqrt(tiles_TPC.shape[1])
    tile = (row // side) * grid[1] + column // side
    return tiles_TPC[tile, (row % side) * side + column % side]


def high_resolution(
    tiles_TPC: Tensor,
    grid: tuple[int, int],
    crop: tuple[int, int],
    unpadded: tuple[int, int],
    size: tuple[int, int],
) -> Tensor:
    """[rows, columns, C] of the plane: unpadded, then bilinear with half-pixel centres."""
    top, left = crop
    picked = []
    for row in range(size[0]):
        for column in range(size[1]):
            y = max(0.0, (row + 0.5) * unpadded[0] / size[0] - 0.5)
            x = max(0.0, (column + 0.5) * unpadded[1] / size[1] - 0.5)
            r0, c0 = int(y), int(x)
            r1, c1 = min(r0 + 1, unpadded[0] - 1), min(c0 + 1, unpadded[1] - 1)
            value = torch.zeros(tiles_TPC.shape[-1])
            for r, in_row in ((r0, 1 - (y - r0)), (r1, y - r0)):
                for c, in_column in ((c0, 1 - (x - c0)), (c1, x - c0)):
                    value += in_row * in_column * at(tiles_TPC, grid, top + r, left + c)
            picked.append(value)
    return torch.stack(picked)


# Of each size in turn: the grid of tiles, then in patches the crop, its size and the plane's.
NEXT = [
    ((2, 2), (0, 1), (8, 6), (8, 6)),
    ((1, 3), (0, 0), (4, 12), (4, 12)),
    ((1, 2), (0, 3), (4, 2), (4, 2)),
    ((2, 2), (2, 0), (4, 8), (4, 8)),
]
ONEVISION = [
    ((3, 3), (0, 0), (12, 12), (5, 5)),
    ((1, 3), (1, 0), (2, 12), (2, 12)),
    ((3, 3), (0, 3), (12, 6), (8, 4)),
    ((1, 1), (0, 1), (4, 2), (4, 2)),
]


def check_planes(images: list[list[VisualTokens]], geometry: Any, known: dict[str, Tensor]) -> None:
    """Both planes of every image against values of the patches [T, P, C], signal by signal."""
    first = 0
    for planes, (grid, crop, unpadded, size) in zip(images, geometry, strict=True):
        low, high = planes
        tiles = slice(first + 1, first + 1 + grid[0] * grid[1])
        assert high.grid == size
        for name, values_TPC in known.items():
            # Attention is at most 1; features and keys are about 10.
            rtol = 0 if name.endswith(ATTENTION) else 1e-4
            value = low.features_ND if name == "features" else low.signals[name]
            close(value.view(low.count, -1), values_TPC[first], rtol)
            value = high.features_ND if name == "features" else high.signals[name]
            expected = high_resolution(values_TPC[tiles], grid, crop, unpadded, size)
            close(value.view(high.count, -1), expected, rtol)
        first = tiles.stop
    assert first == len(known[ATTENTION])


@attentions
@torch.no_grad()
def test_llava_next_reads_cls_rows_tile_by_tile_and_unpads_them_like_features(
    attention: str,
) -> None:
    inputs = llava_next.batch(MIXED)
    rows_TP1 = eager_map("llava_next", inputs, -2)[:, 0, 1:, None]
    model = llava_next.build().model
    states = model.vision_tower(real_tiles(inputs), output_hidden_states=True).hidden_states
    features_TPD = model.multi_modal_projector(states[-2][:, 1:])
    images = planes_of("llava_next", attention, inputs)
    known = {"features": features_TPD, ATTENTION: rows_TP1, CLS_ATTENTION: rows_TP1}
    check_planes(images, NEXT, known)


@pytest.mark.parametrize("feature_layer", [-1, -3, 1, 3])
@torch.no_grad()
def test_saliency_is_read_at_the_depth_of_the_features(feature_layer: int) -> None:
    inputs = llava_next.batch([1])
    adapter = adapter_for(llava_next.build(feature_layer=feature_layer))
    read = adapter.encode(inputs, frozenset({ATTENTION})).images[0].planes[0].signals[ATTENTION]
    layer = feature_layer if feature_layer < 0 else feature_layer - 1
    close(read, eager_map("llava_next", inputs, layer)[0, 0, 1:])


@attentions
@torch.no_grad()
def test_llava_onevision_pools_received_attention_and_keys_like_features(attention: str) -> None:
    inputs = llava_onevision.batch(MIXED)
    received_TP1 = eager_map("llava_onevision", inputs, -1).mean(dim=1)[..., None]
    model = llava_onevision.build().model
    tower = model.vision_tower
    states = tower(real_tiles(inputs), output_hidden_states=True).hidden_states
    last = tower.encoder.layers[-1]
    keys_TPV = last.self_attn.k_proj(last.layer_norm1(states[-2]))
    known = {
        "features": model.multi_modal_projector(states[-1]),
        ATTENTION: received_TP1,
        RECEIVED_ATTENTION: received_TP1,
        KEYS: keys_TPV.unflatten(-1, (4, 8)).mean(dim=2),
    }
    images = planes_of("llava_onevision", attention, inputs)
    check_planes(images, ONEVISION, known)


@pytest.mark.parametrize("patch", [0, 9, 27, 63])
def test_one_special_patch_marks_the_token_the_model_shuffles_it_into(patch: int) -> None:
    one_TPC = torch.zeros(1, 64, 3)
    one_TPC[0, patch] = torch.tensor([1.0, 2.0, 3.0])
    internvl = FAMILIES["internvl"].build().model
    shuffled = internvl.pixel_shuffle(one_TPC.view(1, 8, 8, 3)).view(1, 16, 12)
    idefics3 = FAMILIES["idefics3"].build().model
    assert idefics3.connector.pixel_shuffle(one_TPC).equal(shuffled)
    assert group_patches(one_TPC, 2).flatten(2).equal(shuffled)
    token = (patch // 8 // 2) * 4 + patch % 8 // 2
    assert shuffled[0].any(dim=1).nonzero().tolist() == [[token]]
    marked = average_patch_signal(one_TPC[..., 0], 2)[0]
    assert marked[token] == 0.25
    assert marked.sum() == 0.25
