"""Where pruning pays online: measured by the endpoint as it starts, by size of image and load.

A replica that answers one small image may lose more by selecting than it saves by reading less,
and gain on a large one, or on several at once. So control requests about drawn images are timed at
some sizes and loads, and a request that asks for no pruning of its own is answered like the nearest
of them: with the endpoint's spec where that was surely faster, densely elsewhere.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from PIL import Image

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.ledger import measured_ratio, nanoseconds
from cluster.images import FORMATS
from cluster.protocol import LabelRequest, Priority, Replicas, RowAnswer
from sppruner.engine import SamplingParams
from sppruner.spec import PruneSpec
from sppruner.tiny.scenes import HELD_OUT_SEED, encode_scene, sample_scene

logger = structlog.get_logger(__name__)

SIDES: Final = (224, 448, 896)
"""Pixels of the square images that are timed."""
# Calls of each size and load, behind one that is not counted.
_CALLS: Final = 5
_PROMPT: Final = "Describe the image."
_GENERATION: Final = SamplingParams(max_new_tokens=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Requests about images of so many pixels, `load` of them on a replica at once."""

    pixels: int
    load: int
    found: BreakEven


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineBreakEven:
    """What was measured."""

    cells: tuple[Cell, ...]

    def spec(self, asked: PruneSpec, images: Sequence[bytes | None], load: float) -> PruneSpec:
        """What a request about these images is answered with while `load` are on a replica."""
        pixels = sum(map(_pixels, images))
        if not pixels:
            return asked
        nearest = min(
            self.cells,
            key=lambda c: math.hypot(math.log(pixels / c.pixels), math.log(load / c.load)),
        )
        return nearest.found.spec(asked)

    def to_list(self) -> list[dict[str, Any]]:
        return [
            {"pixels": cell.pixels, "load": cell.load, **cell.found.to_dict()}
            for cell in self.cells
        ]


async def measure(
    replicas: Replicas, spec: PruneSpec, *, most: int, sides: Sequence[int] = SIDES
) -> OnlineBreakEven:
    """Times `spec` beside dense, one request at a time and `most` at once. Raises what `label`
    raises: Serve then starts the endpoint again."""
    cells = []
    for side in sides:
        for load in sorted({1, most}):
            answers = [
                answer
                for number in range(1 + _CALLS)
                for answer in await _timed(replicas, spec, side, load, number)
                if number
            ]
            pairs = [
                (nanoseconds(answer.seconds), nanoseconds(answer.control_seconds))
                for answer in answers
                if answer.control_seconds is not None
            ]
            found = BreakEven(measured=measured_ratio(pairs))
            cells.append(Cell(pixels=side * side, load=load, found=found))
            logger.info("break_even", side=side, load=load, **found.to_dict())
    return OnlineBreakEven(cells=tuple(cells))


async def _timed(
    replicas: Replicas, spec: PruneSpec, side: int, load: int, number: int
) -> list[RowAnswer]:
    calls = [
        LabelRequest(
            id=f"break-even:{side}:{load}:{number}:{row}",
            prompt=_PROMPT,
            images=(_drawn(side, number * load + row),),
            spec=spec,
            generation=_GENERATION,
            control=True,
        )
        for row in range(load)
    ]
    return await replicas.label(calls, priority=Priority.ONLINE)


def _drawn(side: int, number: int) -> bytes:
    return encode_scene(sample_scene(HELD_OUT_SEED + number), side, format="PNG")


def _pixels(image: bytes | None) -> int:
    """By the header; nothing for what is no image, which its replica will say."""
    if image is None:
        return 0
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            return opened.width * opened.height
    except Exception:  # Pillow's parsers raise whatever hostile bytes make them raise.
        return 0
