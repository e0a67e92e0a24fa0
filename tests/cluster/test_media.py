"""The hardened image path: what is refused, what is accepted, and how early."""

from __future__ import annotations

import io
import struct
import time
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cluster.config import MediaLimits
from cluster.errors import ImageMissing, ImageTooLarge, ImageUndecodable, RowError
from cluster.media import decode_image

LIMITS = MediaLimits()


def picture(width: int = 40, height: int = 20) -> Image.Image:
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A few dozen bytes that claim to be a picture of that size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_allowed_formats_decode_to_rgb(kind: str) -> None:
    image = decode_image(encoded(picture(), kind), LIMITS)
    assert (image.mode, image.size) == ("RGB", (40, 20))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused_although_pillow_could_read_them(kind: str) -> None:
    with pytest.raises(ImageUndecodable, match="not a JPEG, PNG or WebP"):
        decode_image(encoded(picture(), kind), LIMITS)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_pixel_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(picture().convert(mode), kind), LIMITS).mode == "RGB"


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    """Pillow's plain conversion turns nearly all of a 16-bit image white."""
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = decode_image(encoded(Image.fromarray(grey), "PNG"), LIMITS)
    assert 120 < np.asarray(image).mean() < 135


def test_transparent_palette_does_not_warn() -> None:
    data = encoded(picture().quantize(8), "PNG", transparency=bytes([0, 128, 255]))
    assert decode_image(data, LIMITS).mode == "RGB"


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90°
    assert decode_image(encoded(picture(), "JPEG", exif=exif), LIMITS).size == (20, 40)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data, LIMITS).getpixel((0, 0)) == (255, 0, 0)


def test_missing_and_empty_are_told_apart() -> None:
    with pytest.raises(ImageMissing):
        decode_image(None, LIMITS)
    with pytest.raises(ImageUndecodable, match="0 bytes"):
        decode_image(b"", LIMITS)


def test_truncated_jpeg_is_an_error_not_a_half_grey_image() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = encoded(noise, "JPEG")
    with pytest.raises(ImageUndecodable, match="truncated"):
        decode_image(data[: len(data) // 2], LIMITS)


def test_html_named_jpg_shows_how_it_starts() -> None:
    with pytest.raises(ImageUndecodable, match="<!DOCTYPE html>"):
        decode_image(b"<!DOCTYPE html><html><body>404</body></html>", LIMITS)


def test_byte_cap_is_checked_before_anything_is_parsed() -> None:
    data = encoded(picture(), "PNG")
    with pytest.raises(ImageTooLarge, match="bytes"):
        decode_image(data, MediaLimits(max_bytes=len(data) - 1))
    assert decode_image(data, MediaLimits(max_bytes=len(data)))


def test_pixel_cap_is_exact() -> None:
    data = encoded(picture(40, 20), "PNG")
    assert decode_image(data, MediaLimits(max_pixels=800))
    with pytest.raises(ImageTooLarge, match="40 x 20"):
        decode_image(data, MediaLimits(max_pixels=799))


@pytest.mark.parametrize(("width", "height"), [(9_000, 9_000), (12_000, 12_000), (50_000, 50_000)])
def test_decompression_bomb_is_refused_from_its_header(width: int, height: int) -> None:
    """Below, between and above Pillow's own two thresholds: same error, within milliseconds."""
    data = png_header(width, height)
    started = time.perf_counter()
    with pytest.raises(ImageTooLarge):
        decode_image(data, LIMITS)
    assert time.perf_counter() - started < 0.05


def test_a_one_pixel_wide_strip_is_an_image() -> None:
    assert decode_image(encoded(picture(1, 20_000), "PNG"), LIMITS).size == (1, 20_000)


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"]),
)
def test_any_bytes_give_an_image_or_a_row_error(data: bytes, magic: bytes) -> None:
    with suppress(RowError):
        assert decode_image(magic + data, LIMITS).mode == "RGB"


@given(st.data())
def test_any_damage_to_a_png_gives_an_image_or_a_row_error(data: st.DataObject) -> None:
    damaged = bytearray(encoded(picture(), "PNG"))
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] = data.draw(st.integers(0, 255))
    with suppress(RowError):
        assert decode_image(bytes(damaged), LIMITS).mode == "RGB"
