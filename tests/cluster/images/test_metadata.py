"""What is beside the pixels never costs the image, and its orientation is kept where it can be."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cluster.config import IMAGE_FORMATS, ImageFormat, MediaLimits
from cluster.images import decode_image
from cluster.images.metadata import strip_metadata
from tests.cluster.images.pictures import encoded_as, png_chunk

LIMITS = MediaLimits()
TURNED = Image.Exif()
TURNED[0x0112] = 6  # 90°
TURNED[0x010E] = "words"
EXIF = TURNED.tobytes()
HUGE = zlib.compress(bytes(4 * 2**20))


def with_chunk(chunk: bytes) -> bytes:
    """A PNG with a chunk behind its header."""
    data = encoded_as("png")
    return data[:33] + chunk + data[33:]


def with_segment(marker: int, body: bytes, *, exif: bytes = b"") -> bytes:
    """A JPEG with a segment in front of all others."""
    data = encoded_as("jpeg", **({"exif": exif} if exif else {}))
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + data[2:]


def with_riff_chunk(kind: bytes, body: bytes) -> bytes:
    data = encoded_as("webp", exif=EXIF)
    data += kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


BROKEN: dict[str, bytes] = {
    "a text of 4 MiB": with_chunk(png_chunk(b"zTXt", b"comment\0\0" + HUGE)),
    "an international text of 4 MiB": with_chunk(png_chunk(b"iTXt", b"comment\0\1\0\0\0" + HUGE)),
    "a hundred texts of 1 MiB": with_chunk(
        b"".join(
            png_chunk(b"zTXt", b"c%d\0\0" % n + zlib.compress(bytes(2**20))) for n in range(100)
        )
    ),
    "a text with a wrong checksum": with_chunk(png_chunk(b"tEXt", b"a\0b")[:-4] + b"zzzz"),
    "a profile that is no zlib": with_chunk(png_chunk(b"iCCP", b"p\0\0nothing")),
    "a profile cut short": with_chunk(png_chunk(b"iCCP", b"")),
    "a gamma without a value": with_chunk(png_chunk(b"gAMA", b"")),
    "a density cut short": with_chunk(png_chunk(b"pHYs", b"\0")),
    "an animation without frames": with_chunk(png_chunk(b"acTL", b"\0\0")),
    "an unknown chunk": with_chunk(png_chunk(b"prVt", b"x" * 1000)),
    "an empty Adobe segment": with_segment(0xEE, b"Adobe"),
    "an empty JFIF segment": with_segment(0xE0, b"JFIF\0"),
    "an empty Photoshop segment": with_segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0"),
    "a profile of half a segment": with_segment(0xE2, b"ICC_PROFILE\0\1"),
    "an index of pictures that are not there": with_segment(
        0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0\4\0\1\0\0\0\2\0\0\0"
    ),
    "an EXIF block of nothing": with_segment(0xE1, b"Exif\0\0"),
    "an EXIF block of zeros": with_segment(0xE1, b"Exif\0\0" + bytes(40)),
    "an XMP packet of noise": with_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<"),
    "an empty comment": with_segment(0xFE, b""),
    "an XMP chunk of noise": with_riff_chunk(b"XMP ", b"\xff\xfe<"),
    "a profile chunk behind the picture": with_riff_chunk(b"ICCP", b"nothing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_metadata_does_not_cost_the_image(name: str) -> None:
    assert sorted(decode_image(BROKEN[name], LIMITS).size) == [20, 40]


@pytest.mark.parametrize("name", ["avif", "heic"])
def test_a_broken_exif_item_does_not_cost_the_image(name: ImageFormat) -> None:
    data = encoded_as(name, exif=EXIF)
    at = data.rindex(b"MM\0*")
    broken = data[:at] + b"\xff" * 8 + data[at + 8 :]
    assert sorted(decode_image(broken, LIMITS).size) == [20, 40]


@pytest.mark.parametrize("tag", [270, 282, 305, 700, 34665, 34675])
@pytest.mark.parametrize("kind", range(1, 17))
def test_a_broken_tag_of_a_tiff_does_not_cost_the_image(tag: int, kind: int) -> None:
    tags = Image.Exif()
    tags[270] = "a description"
    data = bytearray(encoded_as("tiff", exif=tags))
    (directory,) = struct.unpack_from("<I", data, 4)
    at = data.index(struct.pack("<HH", 270, 2), directory)
    struct.pack_into("<HHII", data, at, tag, kind, 2**31, 2**32 - 9)
    assert decode_image(bytes(data), LIMITS).size == (40, 20)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate"])
def test_a_stripped_tiff_has_the_same_pixels(compression: str) -> None:
    data = encoded_as("tiff", compression=compression, description="words", dpi=(72, 72))
    stripped, _ = strip_metadata("tiff", data)
    assert b"\x0e\x01\x02\x00" in data
    assert stripped != data
    assert decode_image(stripped, LIMITS).tobytes() == decode_image(data, LIMITS).tobytes()


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_stripping_keeps_the_pixels(name: ImageFormat) -> None:
    data = encoded_as(name)
    stripped, _ = strip_metadata(name, data)
    assert decode_image(stripped, LIMITS).tobytes() == decode_image(data, LIMITS).tobytes()


@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
def test_the_exif_block_of_a_stripped_image_is_kept(name: ImageFormat) -> None:
    stripped, exif = strip_metadata(name, encoded_as(name, exif=EXIF))
    assert decode_image(stripped, LIMITS).size == (40, 20)
    found = Image.Exif()
    found.load(exif)
    assert found[0x0112] == 6


def test_the_orientation_is_kept_where_other_metadata_is_broken() -> None:
    broken_text = png_chunk(b"zTXt", b"comment\0\0" + HUGE)
    exif = png_chunk(b"eXIf", EXIF.removeprefix(b"Exif\0\0"))
    png = with_chunk(broken_text + exif)
    jpeg = with_segment(0xEE, b"Adobe", exif=EXIF)
    for data in (png, jpeg):
        assert decode_image(data, LIMITS).size == (20, 40)
        assert decode_image(data, LIMITS, lambda width, height: 1).size == (20, 40)


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "tiff"])
def test_metadata_of_every_kind_hides_no_pixel(name: ImageFormat) -> None:
    plain = np.asarray(decode_image(encoded_as(name), LIMITS))
    extra = {} if name == "tiff" else {"xmp": b"<x/>"} if name != "png" else {"dpi": (72, 72)}
    full = encoded_as(name, exif=EXIF, icc_profile=b"x" * 200, **extra)
    stripped, _ = strip_metadata(name, full)
    turned = np.rot90(np.asarray(decode_image(full, LIMITS)))
    assert (turned == plain).all()
    assert len(stripped) <= len(full)
