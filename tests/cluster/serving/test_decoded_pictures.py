"""A replica decodes no further ahead than its engine can use, whatever was sent to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from PIL import Image

from cluster.serving.decoded_pictures import DecodedPictures
from sppruner.engine.interface import Request, Result

MEGAPIXEL = Request(id="r", prompt="p", images=(Image.new("RGB", (1000, 1000)),))


async def decode_calls(
    pictures: DecodedPictures, calls: int, rows: int
) -> list[Callable[[], None]]:
    """Sends calls of one-megapixel rows until none is admitted; what releases each row."""
    held: list[Callable[[], None]] = []

    async def one() -> None:
        async with pictures.turn():
            await asyncio.sleep(0)
            held.extend(pictures.hold(MEGAPIXEL) for _ in range(rows))

    tasks = [asyncio.ensure_future(one()) for _ in range(calls)]
    for _ in range(10 * calls):
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return held


@pytest.mark.parametrize(("rows", "most"), [(1, 10), (16, 10), (4, 100)])
def test_bytes_beyond_the_bound_are_those_of_the_calls_in_decoding(rows: int, most: int) -> None:
    async def scenario() -> None:
        pictures = DecodedPictures(rows=1, calls=2, most_bytes=most * 3_000_000)
        await decode_calls(pictures, calls=50, rows=rows)
        assert most <= pictures.rows < most + 2 * rows
        assert pictures.bytes == 3_000_000 * pictures.rows

    asyncio.run(scenario())


def test_rows_for_the_engines_slots_are_decoded_however_large() -> None:
    async def scenario() -> None:
        pictures = DecodedPictures(rows=16, calls=1, most_bytes=1)
        await decode_calls(pictures, calls=50, rows=4)
        assert pictures.rows == 16

    asyncio.run(scenario())


def test_a_result_makes_room_once() -> None:
    async def scenario() -> None:
        pictures = DecodedPictures(rows=1, calls=1, most_bytes=1)
        (release,) = await decode_calls(pictures, calls=3, rows=1)
        assert await decode_calls(pictures, calls=3, rows=1) == []
        release()
        release()
        assert (pictures.rows, pictures.bytes) == (0, 0)
        assert len(await decode_calls(pictures, calls=3, rows=1)) == 1

    asyncio.run(scenario())


def test_a_row_that_failed_holds_no_bytes() -> None:
    async def scenario() -> None:
        pictures = DecodedPictures(rows=1, calls=1)
        pictures.hold(Result(id="r", text=None, error_code="image_missing"))
        assert pictures.bytes == 0

    asyncio.run(scenario())
