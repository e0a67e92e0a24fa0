"""The one way from untrusted bytes to a decoded image, batch and online alike.

Bytes, format and pixels are checked on the header, before anything is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from cluster.config import MediaLimits
from cluster.errors import ImageMissing, ImageTooLarge, ImageUndecodable
from sppruner.models import JpegScale

FORMATS = ("JPEG", "PNG", "WEBP")
_ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def decode_image(
    data: bytes | None, limits: MediaLimits, jpeg_scale: JpegScale | None = None
) -> Image.Image:
    """The image as plain RGB, upright (EXIF orientation applied), fully in memory.

    jpeg_scale: by how much a JPEG is decoded smaller (`Engine.jpeg_scale`), None for not at all;
    other formats never are. Of an animation, the first frame. Transparency is dropped, as the
    models' own processors do. Raises ImageMissing, ImageTooLarge or ImageUndecodable, and for the
    same bytes whatever the scale; a truncated image is undecodable.
    """
    if data is None:
        raise ImageMissing("the row has no image")
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(f"{len(data):,} bytes, more than the limit of {limits.max_bytes:,}")
    if not data:
        raise ImageUndecodable("the image is empty (0 bytes)")
    with _opened(data) as image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise ImageTooLarge(
                f"{width} x {height} pixels, more than the limit of {limits.max_pixels:,}"
            )
        if jpeg_scale is None or not isinstance(image, JpegImageFile):
            return _rgb(image)
        if image.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE:
            width, height = height, width
    factor = jpeg_scale(width, height)
    if factor > 1:
        try:
            return _decoded(data, factor)
        except ImageUndecodable:
            pass  # Some JPEGs, lossless ones for instance, decode in full or not at all.
    return _decoded(data, 1)


def _decoded(data: bytes, factor: int) -> Image.Image:
    with _opened(data) as image:
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        return _rgb(image)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image with its header read; whatever goes wrong with it inside is a row error."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(str(error)) from error
    except UnidentifiedImageError as error:
        start = data[:16]
        raise ImageUndecodable(f"not a JPEG, PNG or WebP image: starts with {start!r}") from error
    except ImageTooLarge:
        raise
    except Exception as error:
        # Pillow's parsers raise whatever hostile bytes make them raise: OSError, SyntaxError,
        # struct.error, KeyError, OverflowError. One image is one row, so all of it stops here.
        raise ImageUndecodable(f"{type(error).__name__}: {error}"[:300]) from error


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips everything above 255 to white.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
