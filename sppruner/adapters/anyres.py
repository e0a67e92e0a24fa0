"""Any-resolution images (LLaVA-NeXT, LLaVA-OneVision): the whole image at low resolution, then a
grid of tiles at high resolution, cropped to the image's aspect ratio, with a newline token after
each row.

An image is two planes: its low-resolution view, and the unpadded high-resolution grid across all
tiles. Newline tokens belong to no plane.

Shapes: T tiles, P patches of a tile, C channels, N tokens of a plane or run, D width of the
language model, V width of the vision encoder.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from sppruner.adapters.base import Adapter, Encoded, EncodedImage, raster
from sppruner.adapters.tiles import layer_of_state, stack_signals
from sppruner.adapters.towers import skipping_layers_after
from sppruner.cost import ImageShape
from sppruner.errors import InputError
from sppruner.signals import CONTENT_SEED, content_seed, probing
from sppruner.types import VisualTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyresLayout:
    """How the tokens of one image follow from its tiles."""

    side: int
    """Patches along a tile's side."""

    grid: tuple[int, int] = (0, 0)
    """(rows, columns) of high-resolution tiles; (0, 0) if there is only the low-resolution view."""

    crop: tuple[int, int] = (0, 0)
    """(top, left) of the image on the padded grid, in patches."""

    unpadded: tuple[int, int] = (0, 0)
    """(rows, columns) of the image on the padded grid, in patches."""

    size: tuple[int, int] = (0, 0)
    """(rows, columns) of tokens after pooling; `unpadded` without pooling."""

    @classmethod
    def for_image(
        cls,
        image_size: Sequence[int],
        *,
        pinpoints: Any,
        tile: int,
        side: int,
        most_tiles: int | None = None,
    ) -> AnyresLayout:
        """The layout of an image of (height, width) pixels.

        pinpoints: the resolutions that the processor chooses from. tile: pixels along a tile's
        side. most_tiles: a grid with clearly more tokens than this many tiles is pooled to about as
        many; the bound and its slack of 1.1 are the model's. None: no pooling.
        """
        height, width = image_size
        best = select_best_resolution((height, width), pinpoints)
        grid = best[0] // tile, best[1] // tile
        rows, columns = grid[0] * side, grid[1] * side
        top = left = 0
        # The processor pads the image to the grid's aspect ratio; int(round(…, 7)) is the model's
        # own arithmetic for the padding.
        if width / height > columns / rows:
            top = (rows - int(round(height * (columns / width), 7))) // 2
        else:
            left = (columns - int(round(width * (rows / height), 7))) // 2
        unpadded = size = rows - 2 * top, columns - 2 * left
        if most_tiles is not None:
            ratio = math.sqrt(unpadded[0] * unpadded[1] / (most_tiles * side**2))
            if ratio > 1.1:
                size = int(unpadded[0] // ratio), int(unpadded[1] // ratio)
        return cls(side=side, grid=grid, crop=(top, left), unpadded=unpadded, size=size)

    @property
    def tiles(self) -> int:
        """Tiles that the tower encodes, the low-resolution view included."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Visual tokens in the prompt, newlines included."""
        rows, columns = self.size
        newlines = 1 if self.tiles == 1 else rows
        return self.side**2 + rows * columns + newlines

    def shape(self) -> ImageShape:
        """The encoder's input, for the cost model."""
        return ImageShape(tiles=self.tiles, rows=self.side, columns=self.side, tokens=self.tokens)

    def places(self, device: torch.device) -> list[Tensor]:
        """For each plane, the indices of its tokens in the run."""
        base = self.side**2
        places = [torch.arange(base, device=device)]
        rows, columns = self.size
        if rows * columns:
            row = torch.arange(rows, device=device)[:, None] * (columns + 1)
            column = torch.arange(columns, device=device)
            places.append((base + row + column).flatten())
        return places

    def assemble(self, values_TPC: Tensor) -> Tensor:
        """[rows · columns, C] values of the high-resolution plane from its tiles' values [T, P, C],
        by the same reshapes, crop and bilinear pooling as the model's features."""
        width = values_TPC.shape[-1]
        grid = values_TPC.reshape(*self.grid, self.side, self.side, width)
        whole = grid.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)
        (top, left), (rows, columns) = self.crop, self.unpadded
        crop = whole[:, top : top + rows, left : left + columns]
        if self.size != self.unpadded:
            crop = torch.nn.functional.interpolate(crop[None], list(self.size), mode="bilinear")[0]
        return crop.flatten(1).T


def image_sizes(inputs: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """(height, width) in pixels of each image before tiling. Raises InputError if missing."""
    if "image_sizes" not in inputs:
        raise InputError(
            "image_sizes is missing: pass on everything the processor returns, pixel_values alone "
            "do not determine how an image was cut into tiles"
        )
    return [(height, width) for height, width in inputs["image_sizes"].tolist()]


class AnyresAdapter(Adapter):
    """The base of LLaVA-NeXT and LLaVA-OneVision, which differ in tower, probe and layout."""

    @abstractmethod
    def _layouts(self, inputs: Mapping[str, Tensor]) -> list[AnyresLayout]:
        """The layout of each image of a batch."""

    @abstractmethod
    def _probe(self, attention: torch.nn.Module) -> Any:
        """The probe that reads the tower's saliency."""

    @abstractmethod
    def _patch_states(self, output: Any) -> Tensor:
        """[T, P, V] states of all tiles that enter the projector, without a CLS token."""

    @property
    def _side(self) -> int:
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def shapes(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, ImageShape]]:
        layouts = [] if inputs.get("pixel_values") is None else self._layouts(inputs)
        owners = self.assign_rows([layout.tokens for layout in layouts], inputs["input_ids"])
        return [(row, layout.shape()) for (row, _), layout in zip(owners, layouts, strict=True)]

    def encode(self, inputs: Mapping[str, Tensor], signals: frozenset[str]) -> Encoded:
        layouts = self._layouts(inputs)
        owners = self.assign_rows([layout.tokens for layout in layouts], inputs["input_ids"])
        pixels = inputs["pixel_values"].to(self.model.dtype)
        tower = self.model.model.vision_tower
        layers, feature_layer = tower.encoder.layers, self.model.config.vision_feature_layer
        probe = self._probe(layer_of_state(layers, feature_layer).self_attn)
        probed = signals - {CONTENT_SEED}
        sizes = {k: inputs[k] for k in ("image_sizes", "batch_num_images") if k in inputs}
        reading = probing(tower, probe) if probed else nullcontext()
        with skipping_layers_after(layers, feature_layer), reading:
            output = self.model.model.get_image_features(
                pixel_values=pixels, return_dict=True, **sizes
            )
        states_TPV = self._patch_states(output)
        tile_signals = stack_signals(probe, len(states_TPV)) if probed else {}
        pixels_of_image = _split_pixels(pixels, layouts)
        images, first = [], 0
        for i, ((row, index), layout) in enumerate(zip(owners, layouts, strict=True)):
            tiles = slice(first, first + layout.tiles)
            first = tiles.stop
            images.append(
                self._image(
                    layout,
                    row=row,
                    image=index,
                    run_ND=output.pooler_output[i],
                    states_TPV=states_TPV[tiles],
                    tile_signals={name: values[tiles] for name, values in tile_signals.items()},
                    pixels=pixels_of_image[i],
                    signals=signals,
                )
            )
        return Encoded(images=tuple(images), output=output)

    def _image(
        self,
        layout: AnyresLayout,
        *,
        row: int,
        image: int,
        run_ND: Tensor,
        states_TPV: Tensor,
        tile_signals: Mapping[str, Tensor],
        pixels: Tensor,
        signals: frozenset[str],
    ) -> EncodedImage:
        places = layout.places(run_ND.device)
        planes = []
        for p, places_N in enumerate(places):
            low = p == 0
            rows, columns = (layout.side, layout.side) if low else layout.size
            available = {
                name: values[0] if low else _assemble_signal(layout, values[1:])
                for name, values in tile_signals.items()
            }
            if CONTENT_SEED in signals:
                available[CONTENT_SEED] = content_seed(pixels[0] if low else pixels[1:])
            hidden_NV = None
            if self.capabilities.hidden:
                hidden_NV = states_TPV[0] if low else layout.assemble(states_TPV[1:])
            planes.append(
                VisualTokens(
                    features_ND=run_ND[places_N],
                    hidden_NV=hidden_NV,
                    coords_N2=raster(rows, columns, run_ND.device),
                    signals={name: available[name] for name in signals},
                    row=row,
                    image=image,
                    plane=p,
                )
            )
        return EncodedImage(
            row=row,
            image=image,
            run_ND=run_ND,
            planes=tuple(planes),
            places=tuple(places),
            shape=layout.shape(),
        )


def _assemble_signal(layout: AnyresLayout, values: Tensor) -> Tensor:
    """The signal of the high-resolution plane from [T, P] or [T, P, C]."""
    if values.dim() == 2:
        return layout.assemble(values[..., None])[:, 0]
    return layout.assemble(values)


def _split_pixels(pixels: Tensor, layouts: Sequence[AnyresLayout]) -> list[Tensor]:
    """The tiles of each image. The processor pads images to one number of tiles or, unbatched,
    concatenates all tiles."""
    counts = [layout.tiles for layout in layouts]
    if pixels.dim() == 5:
        return [image[:count] for image, count in zip(pixels, counts, strict=True)]
    return list(torch.split(pixels, counts))
