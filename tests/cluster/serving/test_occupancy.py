"""Occupancy: calls side by side, or one alone, and nobody for ever."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Busy
from cluster.serving.occupancy import Occupancy
from tests.cluster.runs.virtual_time import run_in_virtual_time


@given(
    blocks=st.lists(
        st.tuples(st.booleans(), st.integers(0, 20), st.integers(0, 5), st.integers(0, 5)),
        max_size=12,
    )
)
def test_a_block_alone_has_no_neighbour_and_every_block_ends(
    blocks: list[tuple[bool, int, int, int]],
) -> None:
    """Blocks: alone or shared, when it begins, how long it takes, and after how long it is
    cancelled (0: never)."""

    async def body() -> None:
        occupancy = Occupancy()
        inside: list[bool] = []

        async def run(alone: bool, begins: int, takes: int, cancelled: int) -> None:
            await asyncio.sleep(begins)
            try:
                async with asyncio.timeout(cancelled or None):
                    async with occupancy.alone() if alone else occupancy.shared():
                        inside.append(alone)
                        try:
                            assert len(inside) == 1 or True not in inside
                            await asyncio.sleep(takes)
                        finally:
                            inside.remove(alone)
            except (Busy, TimeoutError):
                pass

        await asyncio.gather(*(run(*block) for block in blocks))
        assert not occupancy.taken
        async with occupancy.alone():
            pass

    run_in_virtual_time(body())


def test_only_one_block_at_a_time_waits_to_be_alone() -> None:
    async def body() -> None:
        occupancy = Occupancy()
        async with occupancy.shared():
            waiting = asyncio.ensure_future(_alone(occupancy))
            await asyncio.sleep(0)
            assert occupancy.taken
            with pytest.raises(Busy):
                await _alone(occupancy)
        await waiting

    run_in_virtual_time(body())


async def _alone(occupancy: Occupancy) -> None:
    async with occupancy.alone():
        pass
