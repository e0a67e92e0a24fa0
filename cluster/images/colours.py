"""Pixels of any mode to RGB with 8 bits, as a viewer shows them.

Transparency is dropped, as the models' own processors do. Pillow's own conversion clips shades of
more than 8 bits to white; here they keep their proportions. Most images need neither numpy nor
colour management, and without them a decoding process starts in half the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import numpy as np


def to_rgb(image: Image.Image) -> Image.Image:
    """The loaded image in mode RGB."""
    match image.mode:
        case "RGB":
            return image
        case "I;16" | "I;16L" | "I;16B" | "I;16N" | "I" | "F":
            return _from_shades(image)
        case "P" if "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")
        case "La" | "RGBa":  # colours multiplied by their opacity
            return image.convert("LA" if image.mode == "La" else "RGBA").convert("RGB")
        case "LAB":
            return _from_lab(image)
    return image.convert("RGB")


def _from_shades(image: Image.Image) -> Image.Image:
    """Of an image with more than 8 bits of grey."""
    import numpy as np

    shades = np.asarray(image)
    if image.mode == "I":
        grey = _high_bits(shades)
    else:
        grey = _from_floats(shades) if image.mode == "F" else shades >> 8
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")


def _high_bits(shades: np.ndarray) -> np.ndarray:
    """32-bit shades, of which files use 8, 16 or 32 significant bits."""
    most = int(shades.max(initial=0))
    return shades >> (0 if most < 2**8 else 8 if most < 2**16 else 23)


def _from_floats(shades: np.ndarray) -> np.ndarray:
    """Floating-point shades, which lie in [0, 1] or in [0, 255]; what is no number is black."""
    import numpy as np

    finite = np.nan_to_num(shades, nan=0.0, posinf=255.0, neginf=0.0)
    return finite * (255.0 if finite.max(initial=0) <= 1.0 else 1.0)


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted
