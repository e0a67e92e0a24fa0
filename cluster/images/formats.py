"""Image formats: recognised by their first bytes, so that only one parser ever sees an image.

Formats that are read are those of `MediaLimits.formats`; others are known by name only, for the
error message.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from typing import Final

from PIL import Image, features

from cluster.config import ImageFormat, MediaLimits
from cluster.errors import ImageUndecodable

PILLOW_NAMES: Final[dict[ImageFormat, str]] = {
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tiff": "TIFF",
    "avif": "AVIF",
    "heic": "HEIF",
}
"""Pillow's name of each format that can be read."""

_MAGIC: Final[list[tuple[ImageFormat, re.Pattern[bytes]]]] = [
    ("jpeg", re.compile(rb"\xff\xd8\xff")),
    ("png", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("webp", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("gif", re.compile(rb"GIF8[79]a")),
    ("bmp", re.compile(rb"BM")),
    ("tiff", re.compile(rb"II[*+]\0|MM\0[*+]|MM\*\0|II\0\*")),
]
_BRANDS: Final[dict[ImageFormat, frozenset[bytes]]] = {
    "avif": frozenset([b"avif", b"avis"]),
    "heic": frozenset(b"heic heix heim heis hevc hevx hevm hevs".split()),
}
"""The brands of an ISO base media file (ISO/IEC 14496-12) that holds such an image."""
_OTHERS: Final = {
    "PDF": b"%PDF",
    "PostScript": b"%!PS",
    "Photoshop": b"8BPS",
    "SVG": b"<svg",
    "JPEG 2000": b"\0\0\0\x0cjP  ",
    "JPEG XL": b"\0\0\0\x0cJXL ",
    "icon": b"\0\0\1\0",
    "PPM": b"P6",
    "gzip": b"\x1f\x8b",
    "zip": b"PK\3\4",
}


def image_format(data: bytes) -> ImageFormat | None:
    """The format of an image by its first bytes; None for anything else."""
    for name, magic in _MAGIC:
        if magic.match(data):
            return name
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[at : at + 4] for at in (8, *range(16, end, 4))}
        for name, known in _BRANDS.items():
            if brands & known:
                return name
    return None


def image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height as the header has them; None for what is no readable image."""
    name = image_format(data)
    if name is None:
        return None
    try:
        register(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=[PILLOW_NAMES[name]]) as image:
                return image.size
    except Exception:  # Pillow's parsers raise whatever hostile bytes make them raise.
        return None


def allowed_format(data: bytes, limits: MediaLimits) -> ImageFormat:
    """The format of an image. Raises ImageUndecodable where it is not to be read, or cannot be on
    this machine; the message says what to change."""
    name = image_format(data)
    allowed = ", ".join(limits.formats)
    if name is None:
        other = next((n for n, start in _OTHERS.items() if data.startswith(start)), None)
        what = f"a {other} file" if other else "not an image"
        raise ImageUndecodable(f"{what}, starts with {data[:16]!r}: formats read are {allowed}")
    if name not in limits.formats:
        raise ImageUndecodable(
            f"the image's format {name} is not allowed: MediaLimits.formats has {allowed}"
        )
    register(name)
    return name


def register(name: ImageFormat) -> None:
    """Makes Pillow able to open a format. Raises ImageUndecodable where a package is missing."""
    if name == "heic":
        if importlib.util.find_spec("pillow_heif") is None:
            raise ImageUndecodable(
                "a HEIC image: pip install 'sppruner[heic]' on every machine that decodes"
            )
        import pillow_heif

        # One thread: images are decoded in parallel, each at the expense of its own CPU seconds.
        pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    elif name == "avif":
        if not features.check("avif"):
            raise ImageUndecodable("an AVIF image: this Pillow was built without AVIF")
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
