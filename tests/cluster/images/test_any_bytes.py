"""The law of image decoding: any bytes give an RGB image or a row error, and no warning."""

from __future__ import annotations

import struct
from contextlib import suppress
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import IMAGE_FORMATS, ImageFormat, MediaLimits
from cluster.errors import RowError
from cluster.images import decode_image, image_size
from cluster.images.metadata import strip_metadata
from tests.cluster.images.pictures import encoded_as, png_chunk

# Declared sizes of up to this are allocated.
LIMITS = MediaLimits(max_pixels=1_000_000)
NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]


@cache
def originals(name: ImageFormat) -> list[bytes]:
    """Valid images of a format, in some of its varieties."""
    options: dict[str, list[dict[str, object]]] = {
        "jpeg": [{}, {"progressive": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0" + bytes(16)}],
        "png": [{}, {"optimize": True}],
        "webp": [{}, {"lossless": True}, {"xmp": b"<x/>"}],
        "tiff": [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}],
        "avif": [{"speed": 10}, {"speed": 10, "xmp": b"<x/>"}],
    }
    return [encoded_as(name, **some) for some in options.get(name, [{}])]


@st.composite
def damaged(draw: st.DrawFn, name: ImageFormat) -> bytes:
    """A valid image that something happened to."""
    data = bytearray(draw(st.sampled_from(originals(name))))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(
            st.sampled_from(["bit", "number", "cut", "insert", "repeat", "remove", "chunk"])
        ):
            case "bit" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "number":
                order = draw(st.sampled_from("<>"))
                size = draw(st.sampled_from("BHI"))
                number = draw(st.sampled_from(NUMBERS)) & (256 ** struct.calcsize(size) - 1)
                packed = struct.pack(order + size, number)
                data[at : at + len(packed)] = packed
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=40))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 200))]
            case "remove":
                del data[at : at + draw(st.integers(1, 40))]
            case "chunk" if name == "png":
                kind = draw(st.sampled_from([b"zTXt", b"iCCP", b"acTL", b"fcTL", b"PLTE", b"tRNS"]))
                data[33:33] = png_chunk(kind, draw(st.binary(max_size=30)))
    return bytes(data)


@pytest.mark.parametrize("name", IMAGE_FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_image_is_an_image_or_a_row_error(name: ImageFormat, data: st.DataObject) -> None:
    found = data.draw(damaged(name))
    sizes: list[tuple[int, int]] = []

    def halve(width: int, height: int) -> int:
        sizes.append((width, height))
        return 2

    outcomes = []
    for scale in (None, halve):
        try:
            image = decode_image(found, LIMITS, scale)
        except RowError as error:
            outcomes.append(error.code)
        else:
            assert image.mode == "RGB"
            assert image.width * image.height <= LIMITS.max_pixels
            outcomes.append("decoded")
    assert outcomes[0] == outcomes[1]
    image_size(found)


@pytest.mark.parametrize("name", IMAGE_FORMATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_stripping_never_fails_and_never_grows(name: ImageFormat, data: st.DataObject) -> None:
    found = data.draw(st.one_of(damaged(name), st.binary(max_size=200)))
    pixels, exif = strip_metadata(name, found)
    assert len(pixels) <= len(found) + 20
    assert len(exif) <= len(found)


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF....WEBPVP8X", b"GIF89a"])
    | st.sampled_from(
        [b"BM", b"II*\0", b"MM\0*", b"MM\0+", b"\0\0\0\x18ftypavif", b"....ftypheic"]
    ),
)
def test_any_bytes_behind_a_formats_first_ones_give_an_image_or_a_row_error(
    data: bytes, magic: bytes
) -> None:
    with suppress(RowError):
        assert decode_image(magic + data, LIMITS).mode == "RGB"
