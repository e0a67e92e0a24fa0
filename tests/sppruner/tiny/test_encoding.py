"""Encoded scenes stay byte for byte what published scores were measured on."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sppruner.tiny.scenes import HELD_OUT_SEED, encode_scene, render, sample_scene

# Recorded before the encoders of corpora, evaluation, calibration, suites and training became one
# function; the codecs are those of the Pillow in requirements.lock.
PINNED = [
    (HELD_OUT_SEED, {}, "2aaf4dc33f718daf"),
    (HELD_OUT_SEED + 3, {"pixels": 224, "format": "PNG"}, "7da61732d89729d2"),
    (HELD_OUT_SEED + 2_000_000, {"pixels": 80}, "135de2b428350d43"),
]


@pytest.mark.parametrize(("seed", "options", "digest"), PINNED)
def test_the_bytes_of_a_scene_are_pinned(seed: int, options: dict[str, Any], digest: str) -> None:
    data = encode_scene(sample_scene(seed), **options)
    assert hashlib.sha256(data).hexdigest()[:16] == digest


def test_png_is_lossless_and_jpeg_quality_changes_the_bytes() -> None:
    scene = sample_scene(HELD_OUT_SEED)
    png = Image.open(io.BytesIO(encode_scene(scene, 48, format="PNG")))
    assert np.array_equal(np.asarray(png), np.asarray(render(scene, 48)))
    assert len(encode_scene(scene, 48, quality=50)) < len(encode_scene(scene, 48, quality=97))
