"""Which formats are read: all of the allow-list, nothing else, and an error says what to change."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.config import IMAGE_FORMATS, ImageFormat, MediaLimits, RunConfig
from cluster.errors import ImageUndecodable, UsageError
from cluster.images import decode_image, image_format, image_size
from sppruner.spec import DENSE
from tests.cluster.images.pictures import encoded, encoded_as, picture

LIMITS = MediaLimits()


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_every_format_of_the_allow_list_is_recognised_and_decoded(name: ImageFormat) -> None:
    data = encoded_as(name)
    assert (image_format(data), image_size(data)) == (name, (40, 20))
    image = decode_image(data, LIMITS)
    assert (image.mode, image.size) == ("RGB", (40, 20))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture())).mean() < 2


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_a_format_that_is_not_allowed_is_named_with_the_setting(name: ImageFormat) -> None:
    others = tuple(other for other in IMAGE_FORMATS if other != name)
    with pytest.raises(ImageUndecodable, match=rf"format {name} .*MediaLimits\.formats"):
        decode_image(encoded_as(name), MediaLimits(formats=others))


@pytest.mark.parametrize("kind", ["PPM", "ICO", "JPEG2000", "EPS", "PDF", "TGA", "PCX", "SGI"])
def test_other_formats_that_pillow_can_read_are_refused_unopened(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(picture(), kind)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ImageUndecodable, match="formats read are jpeg, png"):
        decode_image(data, LIMITS)


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_only_the_parser_of_an_images_own_format_sees_it(
    name: ImageFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = Image.open
    tried = []

    def watched(file: io.BytesIO, formats: list[str]) -> Image.Image:
        tried.extend(formats)
        return real(file, formats=formats)

    data = encoded_as(name)
    monkeypatch.setattr(Image, "open", watched)
    decode_image(data, LIMITS)
    assert len(set(tried)) == 1


def test_without_its_package_a_heic_image_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded_as("heic")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImageUndecodable, match=r"pip install 'sppruner\[heic\]'"):
        decode_image(data, LIMITS)
    assert image_size(data) is None


@pytest.mark.parametrize("name", ["gif", "webp", "png", "avif", "tiff"])
def test_of_several_frames_or_pages_the_first_is_read(name: ImageFormat) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], name.upper(), save_all=True, append_images=frames[1:])
    red, green, blue = np.asarray(decode_image(data, LIMITS))[4, 4].astype(int)
    assert red > 240
    assert max(green, blue) < 15


def test_a_jpeg_beside_a_second_one_is_a_jpeg() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(8, 8)])
    assert decode_image(data, LIMITS).size == (40, 20)


def test_formats_and_deadline_are_part_of_a_runs_identity_only_when_set() -> None:
    def identity(media: MediaLimits) -> dict[str, Any]:
        config = RunConfig(
            kind="caption", input="in", output="out", model="m", prompt="p", spec=DENSE, media=media
        )
        return config.identity()["media"]

    old = {"max_bytes": 32 * 2**20, "max_pixels": 64_000_000}
    assert identity(MediaLimits()) == identity(MediaLimits(formats=IMAGE_FORMATS[::-1])) == old
    few = MediaLimits(formats=("png", "jpeg"))
    assert identity(few) == old | {"formats": ["jpeg", "png"]}
    assert set(MediaLimits(**identity(few)).formats) == {"jpeg", "png"}
    patient = MediaLimits(max_decode_seconds=60)
    assert identity(patient) == old | {"max_decode_seconds": 60}
    assert MediaLimits(**identity(patient)) == patient


def test_an_unknown_format_in_the_settings_is_refused() -> None:
    with pytest.raises(UsageError, match="use some of jpeg, png"):
        MediaLimits(formats=("jpg",))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="use some of jpeg, png"):
        MediaLimits(formats=())
