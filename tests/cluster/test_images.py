"""The hardened image path: what is refused, what is accepted, how early, and what is decoded
smaller."""

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
from PIL import Image, ImageDraw, ImageFilter
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


def halved(width: int, height: int) -> int:
    return 2


@cache
def photograph(width: int, height: int) -> Image.Image:
    """Light and shade of every size, edges in every direction, and grain."""
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
def test_what_a_model_is_given_of_a_photograph_hardly_depends_on_its_reduction(
    images: BaseImageProcessor, options: dict[str, object]
) -> None:
    """In steps of the 255 of a pixel, with the margin all but used up."""
    jpeg_scale = jpeg_scale_of(SimpleNamespace(image_processor=images))
    data = encoded(photograph(640, 480), "JPEG", **{"quality": 90, **options})
    assert decode_image(data, LIMITS, jpeg_scale).size == (320, 240)

    whole, reduced = (
        np.asarray(images(decode_image(data, LIMITS, how))["pixel_values"])
        for how in (None, jpeg_scale)
    )
    steps = np.abs(whole - reduced) * 255 * max(images.image_std)
    assert 0 < steps.mean() < 0.6
    assert steps.max() < 25


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True, "quality": 30}])
def test_every_kind_of_jpeg_is_reduced(mode: str, options: dict[str, object]) -> None:
    source = picture(64, 48).convert(mode)
    reduced = decode_image(encoded(source, "JPEG", **options), LIMITS, halved)
    assert (reduced.mode, reduced.size) == ("RGB", (32, 24))
    expected = np.asarray(source.convert("RGB").reduce(2)).astype(int)
    assert np.abs(np.asarray(reduced) - expected).mean() < 3


def test_a_jpeg_with_a_second_picture_behind_it_is_reduced() -> None:
    data = encoded(picture(64, 48), "MPO", save_all=True, append_images=[picture(8, 8)])
    assert decode_image(data, LIMITS, halved).size == (32, 24)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_other_formats_are_never_reduced(kind: str) -> None:
    data = encoded(picture(64, 48), kind)
    asked: list[int] = []

    def halved(width: int, height: int) -> int:
        asked.extend((width, height))
        return 2

    reduced = decode_image(data, LIMITS, halved)
    assert reduced == decode_image(data, LIMITS)
    assert not asked


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduction_is_asked_for_the_upright_image_and_leaves_it_upright(orientation: int) -> None:
    """A bright corner shows where the top left has gone."""
    source = Image.new("RGB", (64, 32))
    source.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(source, "JPEG", exif=exif)
    asked = []

    def jpeg_scale(width: int, height: int) -> int:
        asked.append((width, height))
        return 4

    whole, reduced = decode_image(data, LIMITS), decode_image(data, LIMITS, jpeg_scale)
    assert asked == [whole.size]
    assert reduced.size == (whole.width // 4, whole.height // 4)
    assert np.abs(np.asarray(reduced).astype(int) - np.asarray(whole.reduce(4))).mean() < 3


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_wherever_a_jpeg_is_cut_off_a_reduction_hides_nothing(options: dict[str, object]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    data = encoded(noise, "JPEG", **options)
    whole = [verdict(data[:length], None) for length in range(1, len(data) + 1)]
    reduced = [verdict(data[:length], halved) for length in range(1, len(data) + 1)]
    assert whole == reduced
    assert whole.count(None) < 20


@given(st.data())
def test_damage_to_a_jpeg_gives_the_same_verdict_whatever_the_reduction(
    data: st.DataObject,
) -> None:
    damaged = bytearray(encoded(picture(), "JPEG"))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(2, len(damaged) - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    assert verdict(bytes(damaged), None) == verdict(bytes(damaged), halved)


def verdict(data: bytes, jpeg_scale: JpegScale | None) -> str | None:
    try:
        decode_image(data, LIMITS, jpeg_scale)
    except RowError as error:
        return error.code
    return None


def test_a_lossless_jpeg_which_decodes_in_full_only_is_decoded_in_full() -> None:
    """16 × 16 pixels, the upper half of shade 7, the lower of 200."""
    start = (
        "ffd8ffe000104a46494600010100000100010000ffc3000b080010001001011100ffc400160001010100000000"
    )
    rest = "000000000000000000000708ffda0008010100010000830000000000000000000000000000000"
    data = bytes.fromhex(f"{start}{rest}0d8200000000000000000000000000000003fffd9")
    image = decode_image(data, LIMITS, halved)
    assert image.size == (16, 16)
    assert image.getcolors() == [(128, (7, 7, 7)), (128, (200, 200, 200))]


def test_a_fault_of_what_decides_on_reductions_is_not_blamed_on_the_image() -> None:
    def faulty(width: int, height: int) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        decode_image(encoded(picture(), "JPEG"), LIMITS, faulty)
