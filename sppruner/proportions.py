"""Bounds what an image processor makes of a narrow image, before it is asked to.

Some processors resize the shorter edge to a fixed length: a strip of 1 x 2000 pixels becomes 336 x
672,000. Others refuse proportions beyond a limit of their own, with an exception.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from PIL import Image

from sppruner.errors import ImageTooNarrow

MAX_RATIO: Final = 200
"""Longest to shortest edge; the limit of the Qwen families' `smart_resize`."""

# Of one image after its first resize: 100 MB per channel in float32.
_MAX_RESIZED_PIXELS: Final = 25_000_000


def check_proportions(image_processor: Any, images: Iterable[Image.Image]) -> None:
    """Raises ImageTooNarrow for an image that this processor cannot take at a bounded expense."""
    edge = _fixed_shorter_edge(image_processor)
    for image in images:
        shorter, longer = sorted(image.size)
        if longer > MAX_RATIO * shorter:
            raise ImageTooNarrow(
                f"{image.width} x {image.height} pixels: {longer / shorter:.0f} times as long as "
                f"narrow, more than the limit of {MAX_RATIO}"
            )
        if edge is not None and edge * edge * longer > _MAX_RESIZED_PIXELS * shorter:
            raise ImageTooNarrow(
                f"{image.width} x {image.height} pixels: {longer / shorter:.0f} times as long as "
                f"narrow, and this model resizes the shorter edge to {edge}"
            )


def _fixed_shorter_edge(image_processor: Any) -> int | None:
    """The length that the shorter edge of every image is resized to; None where none is."""
    size = getattr(image_processor, "size", None)
    known = {name: value for name, value in dict(size or {}).items() if value is not None}
    # With a second entry both are numbers of pixels, which bound the resized image.
    return known["shortest_edge"] if set(known) == {"shortest_edge"} else None
