"""Every pixel mode becomes the RGB that a viewer shows."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cluster.config import MediaLimits
from cluster.images import decode_image
from tests.cluster.images.pictures import encoded, picture

LIMITS = MediaLimits()
GREY = np.asarray(picture().convert("L"))


def decoded(image: Image.Image, kind: str, **options: object) -> np.ndarray:
    result = decode_image(encoded(image, kind, **options), LIMITS)
    assert result.mode == "RGB"
    return np.asarray(result).astype(int)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *[(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")],
        *[(mode, "TIFF") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")],
        *[(mode, "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")],
        *[(mode, "GIF") for mode in ("1", "L", "P")],
        *[(mode, "JPEG") for mode in ("L", "RGB", "CMYK", "YCbCr")],
        *[(mode, "WEBP") for mode in ("RGB", "RGBA")],
        *[(mode, "AVIF") for mode in ("RGB", "RGBA")],
    ],
)
def test_every_mode_of_every_format_keeps_its_colours(mode: str, kind: str) -> None:
    source = picture().quantize(64) if mode == "P" else picture().convert(mode)
    expected = np.asarray(picture() if mode == "LAB" else source.convert("RGB"))
    assert np.abs(decoded(source, kind) - expected).mean() < 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_greyscale_keeps_its_shades(kind: str, order: str) -> None:
    """Pillow's plain conversion turns nearly all of a 16-bit image white."""
    image = Image.fromarray((GREY.astype(np.uint16) * 257).astype(order))
    assert (decoded(image, kind) == GREY[..., None]).all()


@pytest.mark.parametrize("bits", [8, 16, 31])
def test_shades_in_32_bits_keep_their_proportions(bits: int) -> None:
    image = Image.fromarray(GREY.astype(np.int32) << (bits - 8))
    assert (decoded(image, "TIFF") == GREY[..., None]).all()


@pytest.mark.parametrize("most", [1.0, 255.0])
def test_floating_point_shades_are_read_at_either_scale(most: float) -> None:
    shades = GREY.astype(np.float32) * (most / 255)
    shades[0, 0] = np.nan
    result = decoded(Image.fromarray(shades), "TIFF")
    assert result[0, 0].tolist() == [0, 0, 0]
    assert np.abs(result - GREY[..., None])[1:].max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_transparency_is_dropped(kind: str) -> None:
    image = Image.new("RGBA", (8, 8), (200, 30, 30, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    assert np.abs(decoded(image, kind)[4, 4] - [200, 30, 30]).max() < 5


def test_transparent_palette_does_not_warn() -> None:
    decoded(picture().quantize(8), "PNG", transparency=bytes([0, 128, 255]))
