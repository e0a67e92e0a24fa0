"""Image decoding: the only path from untrusted bytes to pixels.

Guarantees: bytes, format and pixels are checked on the header, before any pixel is decoded; any
bytes give an RGB image or one of three row errors; metadata that cannot be read costs no image; the
error does not depend on the JPEG scale.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from cluster.config import ImageFormat, MediaLimits
from cluster.errors import ImageMissing, ImageTooLarge, ImageUndecodable
from cluster.images.colours import to_rgb
from cluster.images.formats import PILLOW_NAMES, allowed_format
from cluster.images.metadata import strip_metadata
from sppruner.models import JpegScale

OUT_OF_MEMORY = "decoding takes more memory than its process may use (MediaLimits.decode_memory)"
"""The message for an image that does."""
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
    None: full size. Other formats are always decoded in full. An animation gives its first frame, a
    TIFF its first page. Transparency is dropped, as the models' own processors do. Raises
    ImageMissing, ImageTooLarge or ImageUndecodable, the same for the same bytes whatever the scale;
    a truncated image is undecodable. Not for several threads at once: it silences warnings.
    """
    data = check_bytes(data, limits)
    name = allowed_format(data, limits)
    try:
        return _decode(name, data, limits, jpeg_scale)
    except ImageUndecodable as error:
        # Perhaps only what is beside the pixels is broken, which a viewer never notices.
        pixels, exif = strip_metadata(name, data)
        if pixels == data:
            raise
        try:
            return _decode(name, pixels, limits, jpeg_scale, exif)
        except ImageUndecodable:
            raise error from None


def check_bytes(data: bytes | None, limits: MediaLimits) -> bytes:
    """The bytes of an image that may be decoded. Raises ImageMissing, ImageTooLarge or
    ImageUndecodable."""
    if data is None:
        raise ImageMissing("the row has no image")
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"{len(data):,} bytes, more than the limit of {limits.max_bytes:,} "
            "(MediaLimits.max_bytes)"
        )
    if not data:
        raise ImageUndecodable("the image is empty (0 bytes)")
    return data


def _decode(
    name: ImageFormat,
    data: bytes,
    limits: MediaLimits,
    jpeg_scale: JpegScale | None,
    exif: bytes | None = None,
) -> Image.Image:
    """exif: in place of the image's own; None for its own."""
    with _open_image(name, data) as image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise ImageTooLarge(
                f"{width} x {height} pixels, more than the limit of {limits.max_pixels:,} "
                "(MediaLimits.max_pixels)"
            )
        if jpeg_scale is None or not isinstance(image, JpegImageFile):
            return _load(image, exif)
        if _orientation(image, exif) in _TRANSPOSED:
            width, height = height, width
    factor = jpeg_scale(width, height)
    if factor > 1:
        try:
            return _decode_scaled(name, data, factor, exif)
        except ImageUndecodable:
            pass  # Some JPEGs, lossless ones for instance, decode only at full size.
    return _decode_scaled(name, data, 1, exif)


def _decode_scaled(name: ImageFormat, data: bytes, factor: int, exif: bytes | None) -> Image.Image:
    with _open_image(name, data) as image:
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        return _load(image, exif)


@contextmanager
def _open_image(name: ImageFormat, data: bytes) -> Iterator[Image.Image]:
    """Yields the image with its header read. Errors of Pillow inside become row errors."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of metadata, and of sizes, which have a limit of their own.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=[PILLOW_NAMES[name]]) as image:
                yield image
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(
            f"{error} (Pillow's own limit, which MediaLimits.max_pixels cannot raise)"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageUndecodable(f"begins like {name} and cannot be read as that") from error
    except ImageTooLarge:
        raise
    except MemoryError as error:
        raise ImageUndecodable(OUT_OF_MEMORY) from error
    except Exception as error:
        # On hostile bytes Pillow's parsers raise anything: OSError, SyntaxError, struct.error,
        # KeyError, OverflowError. One image is one row, so no error may pass.
        raise ImageUndecodable(f"{type(error).__name__}: {error}"[:300]) from error


def _orientation(image: Image.Image, block: bytes | None) -> int:
    """The EXIF orientation; 1, upright, where there is none or it cannot be read. No other tag is
    interpreted: a broken one must not cost the image."""
    try:
        exif = image.getexif()
        if block:
            exif.load(block)
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parser raises anything on hostile tags, as its decoders do.
        return 1
    return orientation if isinstance(orientation, int) else 1


def _load(image: Image.Image, exif: bytes | None) -> Image.Image:
    image.load()
    upright = _UPRIGHT.get(_orientation(image, exif))
    return to_rgb(image if upright is None else image.transpose(upright))
