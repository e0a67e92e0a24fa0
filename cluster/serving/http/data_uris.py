"""Images that a request carries as data URIs, in the spellings that clients use."""

from __future__ import annotations

import base64
from typing import Final
from urllib.parse import unquote

from cluster.config import MediaLimits
from cluster.errors import ApiError

_LONGEST_HEAD: Final = 256
_URL_SAFE: Final = str.maketrans("-_", "+/", " \t\r\n")


def read_data_uri(uri: str, limits: MediaLimits) -> bytes:
    """The bytes of a base64 data URI: letters of any case, white space, the alphabet of URLs and
    missing padding are accepted. Raises ApiError; the size is checked on the text, before it is
    decoded."""
    at = uri.find(",", 0, _LONGEST_HEAD)
    head, payload = (uri[:at], uri[at + 1 :]) if at >= 0 else ("", "")
    kind, *parameters = head.strip().lower().split(";")
    if not kind.startswith("data:"):
        raise ApiError(
            "image_url must be a data URI (data:image/png;base64,…): this endpoint fetches nothing",
            code="image_url_not_supported",
            param="messages",
        )
    if "base64" not in (parameter.strip() for parameter in parameters):
        raise ApiError("image data URIs must be base64", code="invalid_image", param="messages")
    if "%" in payload:
        payload = unquote(payload)
    payload = payload.translate(_URL_SAFE).rstrip("=")
    if len(payload) * 3 // 4 > limits.max_bytes:
        raise ApiError(
            f"an image of more than {limits.max_bytes:,} bytes",
            status=413,
            code="image_too_large",
            param="messages",
        )
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except ValueError as error:  # of characters outside ASCII; binascii.Error is one too
        raise ApiError(f"base64: {error}", code="invalid_image", param="messages") from error
