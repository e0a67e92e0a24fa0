"""Image decoding: refused and accepted images, limits before decoding, and JPEGs at a scale."""

from __future__ import annotations

import io
import struct
import time
import zlib
from contextlib import suppress
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cluster.config import MediaLimits
from cluster.errors import ImageMissing, ImageTooLarge, ImageUndecodable, RowError
from cluster.images import decode_image
from sppruner.models import JpegScale
from sppruner.models.jpeg_scaling import jpeg_scale_of
from tests.cluster.images.pictures import encoded, picture

LIMITS = MediaLimits()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few dozen bytes whose header claims this size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


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


def test_missing_and_empty_images_are_different_errors() -> None:
    with pytest.raises(ImageMissing):
        decode_image(None, LIMITS)
    with pytest.raises(ImageUndecodable, match="0 bytes"):
        decode_image(b"", LIMITS)


def test_truncated_jpeg_is_an_error_not_a_half_grey_image() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = encoded(noise, "JPEG")
    with pytest.raises(ImageUndecodable, match="truncated"):
        decode_image(data[: len(data) // 2], LIMITS)


def test_the_error_of_an_html_page_shows_its_first_bytes() -> None:
    with pytest.raises(ImageUndecodable, match="<!DOCTYPE html>"):
        decode_image(b"<!DOCTYPE html><html><body>404</body></html>", LIMITS)


def test_the_byte_limit_is_checked_before_parsing() -> None:
    data = encoded(picture(), "PNG")
    with pytest.raises(ImageTooLarge, match=r"bytes.*\(MediaLimits\.max_bytes\)"):
        decode_image(data, MediaLimits(max_bytes=len(data) - 1))
    assert decode_image(data, MediaLimits(max_bytes=len(data)))


def test_the_pixel_limit_is_exact() -> None:
    data = encoded(picture(40, 20), "PNG")
    assert decode_image(data, MediaLimits(max_pixels=800))
    with pytest.raises(ImageTooLarge, match=r"40 x 20.*\(MediaLimits\.max_pixels\)"):
        decode_image(data, MediaLimits(max_pixels=799))


@pytest.mark.parametrize(("width", "height"), [(9_000, 9_000), (12_000, 12_000), (50_000, 50_000)])
def test_a_decompression_bomb_is_refused_from_its_header(width: int, height: int) -> None:
    """The same error at once below, between and above Pillow's two thresholds."""
    data = png_header(width, height)
    started = time.perf_counter()
    with pytest.raises(ImageTooLarge, match=r"MediaLimits\.max_pixels"):
        decode_image(data, LIMITS)
    assert time.perf_counter() - started < 1


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


def halve(width: int, height: int) -> int:
    return 2


@cache
def photograph(width: int, height: int) -> Image.Image:
    """A synthetic photograph: shades at every scale, edges in every direction, and grain."""
    generator = np.random.default_rng(0)
    light = np.zeros((height, width))
    for cells in (3, 9, 27, 81, 243):
        noise = Image.fromarray(generator.standard_normal((cells, cells)).astype(np.float32))
        light += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / cells**0.3
    shades = 128 + 40 * light[..., None] * [1.0, 0.8, 0.6]
    image = Image.fromarray(shades.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(30):
        corners = generator.uniform((0, 0), (width, height), (3, 2))
        near = corners[0] + (corners - corners[0]) / 5
        colour = tuple(generator.integers(0, 256, 3).tolist())
        draw.polygon([tuple(corner) for corner in near.tolist()], fill=colour)
    image = image.filter(ImageFilter.GaussianBlur(0.7))
    grain = generator.normal(0, 3, (height, width, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "images",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 120}, crop_size={"height": 120, "width": 120}),
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 80},
            crop_size={"height": 80, "width": 80},
            image_grid_pinpoints=[[160, 160], [80, 160]],
        ),
        Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 160 * 120}),
    ],
)
@pytest.mark.parametrize("options", [{}, {"quality": 95, "subsampling": 0}, {"progressive": True}])
def test_pixel_values_of_a_photograph_hardly_depend_on_the_jpeg_scale(
    images: BaseImageProcessor, options: dict[str, object]
) -> None:
    """Differences are in steps of 1/255. The bounds are close to the measured values."""
    jpeg_scale = jpeg_scale_of(SimpleNamespace(image_processor=images))
    data = encoded(photograph(640, 480), "JPEG", **{"quality": 90, **options})
    assert decode_image(data, LIMITS, jpeg_scale).size == (320, 240)

    full, scaled = (
        np.asarray(images(decode_image(data, LIMITS, how))["pixel_values"])
        for how in (None, jpeg_scale)
    )
    steps = np.abs(full - scaled) * 255 * max(images.image_std)
    assert 0 < steps.mean() < 0.6
    assert steps.max() < 25


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True, "quality": 30}])
def test_every_kind_of_jpeg_is_decoded_at_its_scale(mode: str, options: dict[str, object]) -> None:
    source = picture(64, 48).convert(mode)
    scaled = decode_image(encoded(source, "JPEG", **options), LIMITS, halve)
    assert (scaled.mode, scaled.size) == ("RGB", (32, 24))
    expected = np.asarray(source.convert("RGB").reduce(2)).astype(int)
    assert np.abs(np.asarray(scaled) - expected).mean() < 3


def test_a_jpeg_followed_by_a_second_image_is_decoded_at_its_scale() -> None:
    data = encoded(picture(64, 48), "MPO", save_all=True, append_images=[picture(8, 8)])
    assert decode_image(data, LIMITS, halve).size == (32, 24)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_other_formats_are_never_scaled(kind: str) -> None:
    data = encoded(picture(64, 48), kind)
    sizes: list[int] = []

    def halve(width: int, height: int) -> int:
        sizes.extend((width, height))
        return 2

    decoded = decode_image(data, LIMITS, halve)
    assert decoded == decode_image(data, LIMITS)
    assert not sizes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_jpeg_scale_depends_on_the_upright_size_and_keeps_the_image_upright(
    orientation: int,
) -> None:
    """A bright corner marks the top left."""
    source = Image.new("RGB", (64, 32))
    source.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(source, "JPEG", exif=exif)
    sizes = []

    def jpeg_scale(width: int, height: int) -> int:
        sizes.append((width, height))
        return 4

    full, scaled = decode_image(data, LIMITS), decode_image(data, LIMITS, jpeg_scale)
    assert sizes == [full.size]
    assert scaled.size == (full.width // 4, full.height // 4)
    assert np.abs(np.asarray(scaled).astype(int) - np.asarray(full.reduce(4))).mean() < 3


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_a_truncated_jpeg_has_the_same_error_at_any_scale(options: dict[str, object]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    data = encoded(noise, "JPEG", **options)
    full = [error_code(data[:length], None) for length in range(1, len(data) + 1)]
    scaled = [error_code(data[:length], halve) for length in range(1, len(data) + 1)]
    assert full == scaled
    assert full.count(None) < 20


@given(st.data())
def test_a_damaged_jpeg_has_the_same_error_at_any_scale(
    data: st.DataObject,
) -> None:
    damaged = bytearray(encoded(picture(), "JPEG"))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(2, len(damaged) - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    assert error_code(bytes(damaged), None) == error_code(bytes(damaged), halve)


def error_code(data: bytes, jpeg_scale: JpegScale | None) -> str | None:
    try:
        decode_image(data, LIMITS, jpeg_scale)
    except RowError as error:
        return error.code
    return None


def test_a_lossless_jpeg_is_decoded_at_full_size() -> None:
    """The image has 16 × 16 pixels, the upper half of shade 7, the lower half of shade 200."""
    start = (
        "ffd8ffe000104a46494600010100000100010000ffc3000b080010001001011100ffc400160001010100000000"
    )
    rest = "000000000000000000000708ffda0008010100010000830000000000000000000000000000000"
    data = bytes.fromhex(f"{start}{rest}0d8200000000000000000000000000000003fffd9")
    image = decode_image(data, LIMITS, halve)
    assert image.size == (16, 16)
    assert image.getcolors() == [(128, (7, 7, 7)), (128, (200, 200, 200))]


def test_an_error_of_the_scale_function_is_not_an_image_error() -> None:
    def faulty(width: int, height: int) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        decode_image(encoded(picture(), "JPEG"), LIMITS, faulty)


def test_an_odd_exif_tag_beside_the_orientation_does_not_cost_the_image() -> None:
    entries = struct.pack("<H", 2) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    entries += struct.pack("<HHII", 0x11A, 10, 1, 38) + struct.pack("<I", 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + entries + struct.pack("<ii", -1, 0)
    for scale in (None, lambda width, height: 2):
        upright = decode_image(encoded(picture(40, 20), "JPEG", exif=exif), LIMITS, scale)
        assert upright.height == 2 * upright.width


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_as_pillow_turns_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(picture(), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image)
    assert decode_image(data, LIMITS).tobytes() == expected.tobytes()
