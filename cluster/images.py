"""Image decoding: the only path from untrusted bytes to pixels, for batch and online requests.

Guarantees: bytes, format and pixels are checked on the header, before any pixel is decoded; any
bytes give an RGB image or one of three row errors; the error does not depend on the JPEG scale.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from cluster.config import MediaLimits
from cluster.errors import ImageMissing, ImageTooLarge, ImageUndecodable
from sppruner.models import JpegScale

FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats that are decoded, as Pillow names them."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of an EXIF orientation upright."""
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def decode_image(
    data: bytes | None, limits: MediaLimits, jpeg_scale: JpegScale | None = None
) -> Image.Image:
    """The image as RGB with its EXIF orientation applied, fully in memory.

    jpeg_scale: the factor by which a JPEG of a given size is decoded smaller (`Engine.jpeg_scale`);
    None: full size. Other formats are always decoded in full. An animation gives its first frame.
    Transparency is dropped, as the models' own processors do. Raises ImageMissing, ImageTooLarge or
    ImageUndecodable, the same for the same bytes whatever the scale; a truncated image is
    undecodable.
    """
    if data is None:
        raise ImageMissing("the row has no image")
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(f"{len(data):,} bytes, more than the limit of {limits.max_bytes:,}")
    if not data:
        raise ImageUndecodable("the image is empty (0 bytes)")
    with _open_image(data) as image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise ImageTooLarge(
                f"{width} x {height} pixels, more than the limit of {limits.max_pixels:,}"
            )
        if jpeg_scale is None or not isinstance(image, JpegImageFile):
            return _convert_to_rgb(image)
        if _orientation(image) in _TRANSPOSED:
            width, height = height, width
    factor = jpeg_scale(width, height)
    if factor > 1:
        try:
            return _decode_scaled(data, factor)
        except ImageUndecodable:
            pass  # Some JPEGs, lossless ones for instance, decode only at full size.
    return _decode_scaled(data, 1)


def _decode_scaled(data: bytes, factor: int) -> Image.Image:
    with _open_image(data) as image:
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        return _convert_to_rgb(image)


@contextmanager
def _open_image(data: bytes) -> Iterator[Image.Image]:
    """Yields the image with its header read. Errors of Pillow inside become row errors."""
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
        # On hostile bytes Pillow's parsers raise anything: OSError, SyntaxError, struct.error,
        # KeyError, OverflowError. One image is one row, so no error may pass.
        raise ImageUndecodable(f"{type(error).__name__}: {error}"[:300]) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none or it cannot be read. No other tag is
    interpreted: a broken one must not cost the image."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parser raises anything on hostile tags, as its decoders do.
        return 1
    return orientation if isinstance(orientation, int) else 1


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    upright = _UPRIGHT.get(_orientation(image))
    if upright is not None:
        image = image.transpose(upright)
    if image.mode.startswith("I"):
        # 16-bit greyscale: Pillow's conversion clips all values above 255 to white.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
