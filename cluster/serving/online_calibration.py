"""Online calibration: where pruning pays, measured by an endpoint as it starts.

On one small image a replica may lose more by selecting tokens than it saves in the prefill, and
gain on a large one, or on several requests at once. The endpoint therefore times control requests
about drawn images at some sizes and loads. A request without a pruning of its own is answered like
the nearest of them: under the endpoint's spec where that was faster with certainty, else densely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog

from cluster.accounting.breakeven import BreakEven
from cluster.images import image_size
from cluster.protocol import LabelRequest, Priority, Replicas
from sppruner.engine.interface import Result, SamplingParams
from sppruner.spec import PruneSpec
from sppruner.tiny.scenes import HELD_OUT_SEED, encode_scene, sample_scene

logger = structlog.get_logger(__name__)

SIDES: Final = (224, 448, 896)
"""Pixels of the square images that are timed."""
# Timed calls of each size and load, after one that is not timed.
_CALLS: Final = 5
_PROMPT: Final = "Describe the image."
_GENERATION: Final = SamplingParams(max_new_tokens=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The decision for one size and load."""

    pixels: int
    """Pixels of a request's images."""
    load: int
    """Requests on a replica at once."""
    decision: BreakEven
    """Whether pruning pays there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineBreakEven:
    """The decisions of an endpoint."""

    cells: tuple[Cell, ...]
    """One for each size and load that was measured."""

    def spec(self, requested: PruneSpec, images: Sequence[bytes | None], load: float) -> PruneSpec:
        """The spec for a request about these images while `load` requests are on a replica."""
        pixels = sum(map(_pixels, images))
        if not pixels:
            return requested
        nearest = min(
            self.cells,
            key=lambda c: math.hypot(math.log(pixels / c.pixels), math.log(load / c.load)),
        )
        return nearest.decision.spec(requested)

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values, for `/v1/models`."""
        return [
            {"pixels": cell.pixels, "load": cell.load, **cell.decision.to_dict()}
            for cell in self.cells
        ]


async def calibrate_online(
    replicas: Replicas, spec: PruneSpec, *, full_load: int, sides: Sequence[int] = SIDES
) -> OnlineBreakEven:
    """Times `spec` beside dense, one request at a time and `full_load` at once. Raises what
    `Replicas.label` raises: Serve then starts the endpoint again."""
    cells = []
    loads = sorted({1, full_load})
    for side in sides:
        for load in loads:
            results = [
                result
                for number in range(1 + _CALLS)
                for result in await _run_control_call(replicas, spec, side, load, number)
                if number
            ]
            decision = BreakEven.from_results(results, decisions=len(sides) * len(loads))
            cells.append(Cell(pixels=side * side, load=load, decision=decision))
            logger.info("break_even", side=side, load=load, **decision.to_dict())
    return OnlineBreakEven(cells=tuple(cells))


async def _run_control_call(
    replicas: Replicas, spec: PruneSpec, side: int, load: int, number: int
) -> list[Result]:
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
    width, height = (image_size(image) if image else None) or (0, 0)
    return width * height
