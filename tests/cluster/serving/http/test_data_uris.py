"""Data URIs in every spelling that clients use, and nothing that is fetched."""

from __future__ import annotations

import base64
import time
from contextlib import suppress
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import MediaLimits
from cluster.errors import ApiError
from cluster.serving.http.data_uris import read_data_uri

LIMITS = MediaLimits(max_bytes=1000)
HEADS = [
    "data:image/png;base64,",
    "DATA:image/PNG;BASE64,",
    "data:;base64,",
    "data:image/jpeg;charset=utf-8;base64,",
    "data:image/jpeg; base64,",
]


@given(st.binary(min_size=1, max_size=200), st.sampled_from(HEADS), st.data())
def test_every_spelling_of_the_same_bytes_is_read(
    data: bytes, head: str, draw: st.DataObject
) -> None:
    encoded = base64.b64encode(data).decode()
    spellings = [
        encoded,
        encoded.rstrip("="),
        base64.urlsafe_b64encode(data).decode(),
        "\r\n".join(encoded[i : i + 76] for i in range(0, len(encoded), 76)),
        quote(encoded, safe=""),
    ]
    assert read_data_uri(head + draw.draw(st.sampled_from(spellings)), LIMITS) == data


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("https://example.com/a.png", "image_url_not_supported"),
        ("file:///etc/passwd", "image_url_not_supported"),
        ("data:image/png;base64", "image_url_not_supported"),
        ("", "image_url_not_supported"),
        ("data:image/svg+xml,<svg/>", "invalid_image"),
        ("data:image/png;base64,@@@", "invalid_image"),
        ("data:image/png;base64,ÄÄÄÄ", "invalid_image"),
        ("data:image/png;base64,AAAAA", "invalid_image"),
        ("data:image/png;base64,AA=A", "invalid_image"),
        ("data:image/png;base64," + "A" * 1400, "image_too_large"),
    ],
)
def test_what_is_no_data_uri_is_refused(uri: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_data_uri(uri, LIMITS)
    assert (caught.value.api_code, caught.value.param) == (code, "messages")


@pytest.mark.parametrize("head", [";" * 5_000_000, "data:" + "ab;" * 2_000_000, "data:;base64"])
def test_a_head_of_megabytes_costs_nothing(head: str) -> None:
    started = time.process_time()
    with pytest.raises(ApiError):
        read_data_uri(head, LIMITS)
    assert time.process_time() - started < 0.2


@given(st.text(max_size=60))
def test_no_uri_raises_anything_else(text: str) -> None:
    for uri in (text, f"data:;base64,{text}"):
        with suppress(ApiError):
            read_data_uri(uri, LIMITS)
