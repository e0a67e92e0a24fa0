"""Small pictures in every format."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from cluster.config import ImageFormat
from cluster.images.formats import PILLOW_NAMES, register


def picture(width: int = 40, height: int = 20) -> Image.Image:
    """A ramp of colours."""
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """kind: as Pillow names it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encoded_as(name: ImageFormat, **options: object) -> bytes:
    """The usual picture in one of the formats that are read."""
    register(name)
    return encoded(picture(), PILLOW_NAMES[name], **options)


def png_chunk(name: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + checksum


def slow_jpeg(scans: int = 200, side: int = 1000) -> bytes:
    """A progressive JPEG whose last scan is there many times over: a few bytes, and each scan is
    another pass over all pixels."""
    data = encoded(Image.new("RGB", (side, side), "gray"), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * scans + data[end:]
