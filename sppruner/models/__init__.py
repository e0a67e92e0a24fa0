"""Finding and loading models, their processors, and how far their JPEGs may be scaled down.

Importing this package loads neither torch nor transformers; its modules do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

JpegScale: TypeAlias = Callable[[int, int], int]
"""The factor by which an upright JPEG of a width and height may be decoded smaller: 1, 2, 4 or 8,
a divisor of both."""

__all__ = ["JpegScale"]
