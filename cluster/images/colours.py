"""Pixels of any mode to RGB with 8 bits, as a viewer shows them.

Transparency is dropped, as the models' own processors do. Pillow's own conversion clips shades of
more than 8 bits to white; here they keep their proportions.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms


def to_rgb(image: Image.Image) -> Image.Image:
    """The loaded image in mode RGB."""
    match image.mode:
        case "RGB":
            return image
        case "I;16" | "I;16L" | "I;16B" | "I;16N":
            return _grey((np.asarray(image) >> 8).astype(np.uint8))
        case "I":
            return _grey(_high_bits(np.asarray(image)))
        case "F":
            return _grey(_from_floats(np.asarray(image)))
        case "P" if "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")
        case "La" | "RGBa":  # colours multiplied by their opacity
            return image.convert("LA" if image.mode == "La" else "RGBA").convert("RGB")
        case "LAB":
            lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
            assert converted is not None
            return converted
    return image.convert("RGB")


def _grey(shades: np.ndarray) -> Image.Image:
    return Image.fromarray(shades).convert("RGB")


def _high_bits(shades: np.ndarray) -> np.ndarray:
    """32-bit shades, which files use for 8, 16 or 32 significant bits."""
    most = int(shades.max(initial=0))
    shift = next(bits for bits in (0, 8, 23) if most >> bits < 256 or bits == 23)
    return np.clip(shades >> shift, 0, 255).astype(np.uint8)


def _from_floats(shades: np.ndarray) -> np.ndarray:
    """Floating-point shades, which lie in [0, 1] or in [0, 255]; what is no number is black."""
    finite = np.nan_to_num(shades, nan=0.0, posinf=255.0, neginf=0.0)
    scale = 255.0 if finite.max(initial=0) <= 1.0 else 1.0
    return np.clip(finite * scale, 0, 255).astype(np.uint8)
