"""Strips what is not pixels from a compressed image, for images whose metadata no parser survives.

Works on bytes alone and never fails: what it does not understand it leaves as it is. Structure
after the PNG specification (W3C), ITU-T T.81 (JPEG), RFC 9649 (WebP), TIFF 6.0 and BigTIFF, and
ISO/IEC 14496-12 (AVIF, HEIC).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Final, TypeAlias

from cluster.config import ImageFormat

Stripped: TypeAlias = tuple[bytes, bytes]
"""The image without metadata, and its EXIF block; empty without one."""

_PNG_KEPT: Final = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# Tags that decide what the pixels of a TIFF are; the others describe them.
_TIFF_KEPT: Final = frozenset(
    int(tag)
    for tag in """
        256 257 258 259 262 266 273 274 277 278 279 284 292 293 317 320 322 323 324 325 332 338 339
        347 512 513 514 515 517 518 519 520 521 529 530 531 532
    """.split()
)
# An item of an ISO media file that holds EXIF ("Exif") or XMP ("mime"): `infe` of version 2 or 3.
_METADATA_ITEM: Final = re.compile(rb"(infe(?:\x02.{3}.{4}|\x03.{3}.{6}))(?:Exif|mime)", re.DOTALL)


def strip_metadata(name: ImageFormat, data: bytes) -> Stripped:
    """The image with its pixels and what is needed to decode them, and its EXIF block."""
    strip = _STRIPPERS.get(name)
    try:
        return strip(data) if strip is not None else (data, b"")
    except (
        struct.error,
        ArithmeticError,
        LookupError,
        ValueError,
    ):  # Half a structure.
        return data, b""


def _strip_png(data: bytes) -> Stripped:
    kept, exif, at = [data[:8]], b"", 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind in _PNG_KEPT:
            kept.append(data[at:end])
        elif kind == b"eXIf":
            exif = data[at + 8 : end - 4]
        if kind == b"IEND":
            break
        at = end
    return b"".join(kept), exif


def _strip_jpeg(data: bytes) -> Stripped:
    """Up to the first scan: tables and frame, JFIF's and Adobe's colour markers."""
    kept, exif, at = [data[:2]], b"", 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD7:  # padding, or a marker alone
            at += 1 if marker == 0xFF else 2
            continue
        if marker in (0xDA, 0xD9):
            break
        (length,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + length]
        jfif = marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14
        adobe = marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
        if jfif or adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at : at + 2 + length])
        elif marker == 0xE1 and body.startswith(b"Exif\0") and not exif:
            exif = body
        at += 2 + length
    return b"".join([*kept, data[at:]]), exif


def _strip_webp(data: bytes) -> Stripped:
    kept, exif, at = list[bytes](), b"", 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        end = at + 8 + length + length % 2
        if kind == b"VP8X":  # Its flags name the chunks that are dropped.
            kept.append(data[at : at + 8] + bytes([data[at + 8] & 0b11010011]) + data[at + 9 : end])
        elif kind == b"EXIF":
            exif = data[at + 8 : at + 8 + length]
        elif kind not in (b"ICCP", b"XMP "):
            kept.append(data[at:end])
        at = end
    body = b"".join(kept)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body, exif


def _strip_tiff(data: bytes) -> Stripped:
    """The first page's directory rewritten in its place, with fewer entries. The orientation is one
    of the tags that stay."""
    order = "<" if data[:2] == b"II" else ">"
    big = b"+" in data[2:4]
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    number, size = (order + "Q", 20) if big else (order + "H", 12)
    (count,) = struct.unpack_from(number, data, at)
    first = at + struct.calcsize(number)
    end = min(first + count * size, len(data) - size + 1)  # A count of 2**64 costs nothing.
    entries = [data[start : start + size] for start in range(first, end, size)]
    kept = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in _TIFF_KEPT]
    directory = struct.pack(number, len(kept)) + b"".join(kept) + bytes(8 if big else 4)
    return data[:at] + directory + data[at + len(directory) :], b""


def _strip_iso_media(data: bytes) -> Stripped:
    """Metadata items become items of an unknown type. The orientation is not in their EXIF."""
    return _METADATA_ITEM.sub(rb"\1skip", data), b""


_STRIPPERS: Final[dict[ImageFormat, Callable[[bytes], Stripped]]] = {
    "png": _strip_png,
    "jpeg": _strip_jpeg,
    "webp": _strip_webp,
    "tiff": _strip_tiff,
    "avif": _strip_iso_media,
    "heic": _strip_iso_media,
}
