"""Bodies are bounded in bytes, alone and together, in time, and in what their JSON may become."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
from fastapi import Request

from cluster.errors import ApiError
from cluster.serving.http.request_body import MOST_VALUES, Body, BodyRoom


def request(*pieces: bytes, wait: float = 0.0) -> Request:
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(wait)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    return Request({"type": "http", "headers": []}, receive)


def read(body: Body, *pieces: bytes, limit: int = 1000, **seconds: float) -> bytes:
    wait = seconds.pop("wait", 0.0)
    return asyncio.run(body.read(request(*pieces, wait=wait), limit, **seconds))


def test_a_body_is_read_to_its_end_and_counted_until_its_request_ends() -> None:
    room = BodyRoom(100)
    with room.held() as body:
        assert read(body, b"ab", b"cd") == b"abcd"
        assert room.bytes == 4
    assert room.bytes == 0


def test_bodies_share_a_room_and_one_that_does_not_fit_is_told_to_come_again() -> None:
    room = BodyRoom(100)
    with room.held() as first, room.held() as second:
        read(first, b"x" * 80)
        with pytest.raises(ApiError) as caught:
            read(second, b"x" * 10, b"x" * 20)
        assert (caught.value.status, caught.value.api_code) == (503, "overloaded")
    assert room.bytes == 0
    with room.held() as alone:  # larger than the room, and nobody else is in it
        assert len(read(alone, b"x" * 200)) == 200


def test_a_body_that_comes_slowly_is_given_up() -> None:
    with BodyRoom(100).held() as body, pytest.raises(ApiError) as caught:
        read(body, b"a", wait=5.0, piece_seconds=0.05)
    assert caught.value.status == 408
    with BodyRoom(100).held() as body, pytest.raises(ApiError) as caught:
        read(body, *[b"a"] * 50, wait=0.02, piece_seconds=1.0, body_seconds=0.1)
    assert caught.value.status == 408


def test_a_body_of_more_values_than_any_request_needs_is_refused_unparsed() -> None:
    many = b"[" + b"{}," * MOST_VALUES
    with BodyRoom(len(many)).held() as body, pytest.raises(ApiError) as caught:
        read(body, many, limit=len(many))
    assert (caught.value.status, caught.value.api_code) == (413, "body_too_large")


def test_a_failing_sender_leaves_nothing_in_the_room() -> None:
    room = BodyRoom(100)

    async def gone() -> AsyncIterator[bytes]:
        yield b"abc"
        raise ConnectionError

    class Sender:
        headers: ClassVar[dict[str, str]] = {}

        def stream(self) -> AsyncIterator[bytes]:
            return gone()

    with pytest.raises(ConnectionError), room.held() as body:
        asyncio.run(body.read(Sender(), 100))  # type: ignore[arg-type]
    assert room.bytes == 0
