"""Online calibration: where pruning pays, measured by an endpoint as it starts.

On one small image a replica may lose more by selecting tokens than it saves in the prefill, and
gain on a large one, or on several requests at once. The endpoint therefore answers requests about
drawn images both ways at some sizes and loads. A request without a pruning of its own is answered
under the endpoint's spec where that was faster with certainty at all of the nearest sizes and
loads, below and above; else densely, as are images smaller than any that was measured. Above the
largest size and load the largest one decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.speedup import NANO, Block, nanoseconds
from cluster.images import image_size
from cluster.protocol import LabelRequest, Priority, Replicas
from sppruner.engine.interface import SamplingParams
from sppruner.spec import DENSE, PruneSpec
from sppruner.tiny.scenes import HELD_OUT_SEED, encode_scene, sample_scene

logger = structlog.get_logger(__name__)

SIDES: Final = (224, 448, 896)
"""Pixels of the square images that are timed."""
# Of each size and load, after one that is not counted.
_BLOCKS: Final = 5
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
        sizes = _around(pixels, [cell.pixels for cell in self.cells])
        loads = _around(load, [cell.load for cell in self.cells])
        near = [c for c in self.cells if c.pixels in sizes and c.load in loads]
        return requested if near and all(cell.decision.pays for cell in near) else DENSE

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values, for `/v1/models`. Intervals hold together: each has a confidence above
        that of a single one."""
        return [
            {"pixels": cell.pixels, "load": cell.load, **cell.decision.to_dict()}
            for cell in self.cells
        ]


async def calibrate_online(
    replicas: Replicas, spec: PruneSpec, *, full_load: int, sides: Sequence[int] = SIDES
) -> OnlineBreakEven:
    """Times `spec` beside dense, one request at a time and `full_load` at once. Raises what
    `Replicas.label` raises: Serve then starts the endpoint again."""
    cells, scenes = [], itertools.count()
    loads = sorted({1, full_load})
    for side in sides:
        for load in loads:
            blocks, spent = list[Block](), 0
            for number in range(1 + _BLOCKS):
                found = await _measure(replicas, spec, side, load, number, scenes)
                blocks += found if number else []  # the first one pays for allocations
                spent += sum(block.pruned + block.dense for block in found)
            decision = BreakEven.from_blocks(
                blocks, decisions=len(sides) * len(loads), seconds=spent / NANO
            )
            cells.append(Cell(pixels=side * side, load=load, decision=decision))
            logger.info("break_even", side=side, load=load, **decision.to_dict())
    return OnlineBreakEven(cells=tuple(cells))


async def _measure(
    replicas: Replicas, spec: PruneSpec, side: int, load: int, number: int, scenes: Iterator[int]
) -> list[Block]:
    """One block: `load` requests at once, one way and then the other, in turns. Each is about an
    image of its own, the next of `scenes`, as strangers' requests are: nothing of it is in a
    cache."""
    arms = [spec, DENSE]
    nanoseconds_of = dict.fromkeys(arms, 0)
    device = ""
    for arm in arms if number % 2 else arms[::-1]:
        calls = [
            LabelRequest(
                id=f"break-even:{side}:{load}:{scene}",
                prompt=_PROMPT,
                images=(_drawn(side, scene),),
                spec=arm,
                generation=_GENERATION,
            )
            for scene in itertools.islice(scenes, load)
        ]
        for result in await replicas.label(calls, priority=Priority.ONLINE):
            if result.error_code is not None:
                return []
            nanoseconds_of[arm] += nanoseconds(result.seconds)
            device = result.device or ""
    return [Block(nanoseconds_of[spec], nanoseconds_of[DENSE], load, device)]


def _around(at: float, measured: Collection[int]) -> set[int]:
    """The measured values next below and above; the largest above all of them, none below them."""
    below = [value for value in measured if value <= at]
    above = [value for value in measured if value >= at]
    return {max(below), min(above, default=max(below))} if below else set()


def _drawn(side: int, number: int) -> bytes:
    return encode_scene(sample_scene(HELD_OUT_SEED + number), side, format="PNG")


def _pixels(image: bytes | None) -> int:
    """By the header; nothing for what is no image, which its replica will say."""
    width, height = (image_size(image) if image else None) or (0, 0)
    return width * height
