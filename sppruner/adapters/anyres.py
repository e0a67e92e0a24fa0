"""Any-resolution images (LLaVA-NeXT, LLaVA-OneVision): the whole image at low resolution, then a
grid of tiles at high resolution, cropped to the image's aspect ratio, with a newline token after
each row.

An image is two planes: its low-resolution view, and the unpadded high-resolution grid across all
tiles. Newline tokens belong to no plane.

Shapes: T tiles, P patches of a tile, C channels, N tokens of a plane or run, D width of the
language model, V width of the vision encoder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sppruner.adapters.anyres_layout import AnyresLayout
from sppruner.adapters.base import Adapter, Encoded, EncodedImage, TowerOutput, raster
from sppruner.adapters.tiles import layer_of_state, stack_signals, stacked
from sppruner.adapters.towers import skipping_layers_after
from sppruner.cost import ImageShape
from sppruner.signals import CONTENT_SEED, content_seed, probing
from sppruner.types import VisualTokens


class AnyresAdapter(Adapter):
    """The base of LLaVA-NeXT and LLaVA-OneVision, which differ in tower, probe and layout."""

    @abstractmethod
    def layouts(self, inputs: Mapping[str, Tensor]) -> list[AnyresLayout]:
        """The layout of each image of a processor's batch; its prompts are not read."""

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
        layouts = [] if inputs.get("pixel_values") is None else self.layouts(inputs)
        owners = self.assign_rows([layout.tokens for layout in layouts], inputs["input_ids"])
        return [(row, layout.shape()) for (row, _), layout in zip(owners, layouts, strict=True)]

    def encode(self, inputs: Mapping[str, Tensor], signals: frozenset[str]) -> Encoded:
        layouts = self.layouts(inputs)
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
        tiles = sum(layout.tiles for layout in layouts)
        read = TowerOutput(
            runs=output.pooler_output,
            states=self._patch_states(output),
            signals=[probe.signals(tile) if probed else {} for tile in range(tiles)],
            pixels=[tile for image in _split_pixels(pixels, layouts) for tile in image],
        )
        return Encoded(images=self.images(read, owners, layouts, signals), output=output)

    def images(
        self,
        tower: TowerOutput,
        owners: Sequence[tuple[int, int]],
        layouts: Sequence[AnyresLayout],
        signals: frozenset[str],
    ) -> tuple[EncodedImage, ...]:
        images, first = [], 0
        for run_ND, (row, index), layout in zip(tower.runs, owners, layouts, strict=True):
            tiles = slice(first, first + layout.tiles)
            first = tiles.stop
            images.append(
                self._image(
                    layout, row, index, run_ND=run_ND, tower=tower, tiles=tiles, signals=signals
                )
            )
        return tuple(images)

    def _image(
        self,
        layout: AnyresLayout,
        row: int,
        image: int,
        *,
        run_ND: Tensor,
        tower: TowerOutput,
        tiles: slice,
        signals: frozenset[str],
    ) -> EncodedImage:
        tile_signals = stack_signals(tower.signals[tiles])
        states, pixels = tower.states[tiles], tower.pixels[tiles]
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
                available[CONTENT_SEED] = content_seed(pixels[0] if low else stacked(pixels[1:]))
            hidden_NV = None
            if self.capabilities.hidden:
                hidden_NV = states[0] if low else layout.assemble(stacked(states[1:]))
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
