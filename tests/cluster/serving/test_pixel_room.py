"""Online requests are let in as they come, while their pixels have room."""

from __future__ import annotations

import asyncio

import pytest

from cluster.serving.pixel_room import PixelRoom


def test_pixels_at_the_same_time_are_bounded_and_nobody_is_overtaken() -> None:
    order, most_seen = [], 0

    async def scenario() -> None:
        nonlocal most_seen
        room = PixelRoom(10)

        async def hold(name: int, pixels: int) -> None:
            nonlocal most_seen
            async with room.held(pixels):
                order.append(name)
                most_seen = max(most_seen, room.pixels)
                await asyncio.sleep(0.01)

        await asyncio.gather(*(hold(name, pixels) for name, pixels in enumerate([6, 6, 1, 10, 3])))
        assert room.pixels == 0

    asyncio.run(asyncio.wait_for(scenario(), 10))
    assert order == [0, 1, 2, 3, 4]
    assert most_seen <= 10


def test_a_request_larger_than_the_room_is_let_in_alone_and_one_without_images_at_once() -> None:
    async def scenario() -> None:
        room = PixelRoom(10)
        async with room.held(50):
            async with room.held(0):
                pass
            waiting = asyncio.create_task(room.held(1).__aenter__())
            await asyncio.sleep(0.01)
            assert not waiting.done()
        await waiting

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_waiter_that_gives_up_takes_no_room() -> None:
    async def scenario() -> None:
        room = PixelRoom(10)
        async with room.held(8):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), room.held(5):
                    pass
        assert room.pixels == 0
        async with room.held(10):
            pass

    asyncio.run(asyncio.wait_for(scenario(), 10))
