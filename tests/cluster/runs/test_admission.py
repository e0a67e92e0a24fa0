"""Admission: rows in flight are bounded in rows until their length is known, then in tokens, and in
bytes of their images."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cluster.protocol import LabelRequest
from cluster.runs.admission import Admission
from sppruner.engine import SamplingParams
from sppruner.engine.interface import Result


def observe(
    admission: Admission, *prompt_tokens: int, new: int = 10, error: str | None = None
) -> None:
    """Reports results with these prompt lengths and answers of up to `new` tokens."""
    generation = SamplingParams(max_new_tokens=new)
    calls = [
        LabelRequest(id=str(n), prompt="p", generation=generation)
        for n in range(len(prompt_tokens))
    ]
    admission.observe(
        calls,
        [
            Result(id=call.id, text="x", prompt_tokens=tokens, error_code=error)
            for call, tokens in zip(calls, prompt_tokens, strict=True)
        ],
    )


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))


def test_before_the_first_result_only_rows_are_counted() -> None:
    admission = Admission(rows=48, tokens=100)
    assert admission.rows == 48
    observe(admission, 0, error="image_missing")
    assert admission.rows == 48


def test_the_token_capacity_bounds_long_rows_and_the_slots_bound_short_rows() -> None:
    admission = Admission(rows=48, tokens=1000, waiting=5)
    observe(admission, 90, 90)
    assert admission.rows == 10 + 5  # 1,000 tokens hold 10 rows of 90 + 10 tokens, and 5 wait
    observe(admission, *[0] * 100)
    assert admission.rows == 48 + 5


def test_without_a_token_capacity_the_row_length_has_no_effect() -> None:
    admission = Admission(rows=48)
    observe(admission, 100_000)
    assert admission.rows == 48


def test_the_row_length_is_estimated_from_recent_rows() -> None:
    """A corpus that is sorted by size has its long rows first."""
    admission = Admission(rows=48, tokens=1000)
    for _ in range(1000):
        observe(admission, *[990] * 16)
    assert admission.rows == 1
    for _ in range(500):
        observe(admission, *[0] * 16)
    assert admission.rows == 48


def test_a_call_larger_than_the_bound_is_admitted_when_nothing_is_in_flight() -> None:
    async def body() -> None:
        admission = Admission(rows=1)
        admitted = 0

        async def call() -> None:
            nonlocal admitted
            async with admission.admit(16):
                admitted += 1
                assert admitted == 1
                await asyncio.sleep(0)
                admitted -= 1

        await asyncio.gather(*(call() for _ in range(8)))

    run(body)


def test_admission_is_fifo_so_small_calls_do_not_overtake_a_large_one() -> None:
    """Small calls fit into every gap, so a call of control rows would wait for all of them."""

    async def body() -> None:
        admission = Admission(rows=8)
        started: list[int] = []

        async def call(number: int, rows: int) -> None:
            async with admission.admit(rows):
                started.append(number)
                await asyncio.sleep(0.001 * (1 + number % 3))

        sizes = [2, 2, 2, 8, *[2] * 12]
        await asyncio.gather(*(call(number, rows) for number, rows in enumerate(sizes)))
        assert started == list(range(len(sizes)))

    run(body)


def test_a_cancelled_waiter_does_not_block_later_ones() -> None:
    async def body() -> None:
        admission = Admission(rows=4)
        async with admission.admit(4):
            first = asyncio.ensure_future(_hold(admission, 4))
            second = asyncio.ensure_future(_hold(admission, 4))
            await asyncio.sleep(0)
            first.cancel()
        await second
        assert first.cancelled()

    run(body)


async def _hold(admission: Admission, rows: int) -> None:
    async with admission.admit(rows):
        pass


def test_a_call_that_is_sent_again_goes_first() -> None:
    """Rows of its unit that are answered already take memory until it is."""

    async def body() -> None:
        admission = Admission(rows=1)
        started: list[str] = []

        async def call(name: str) -> None:
            async with admission.admit(1, again=name == "again"):
                started.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(*(call(name) for name in ("a", "b", "c", "again")))
        assert started == ["a", "again", "b", "c"]

    run(body)


def test_the_bounds_follow_the_replicas_that_live() -> None:
    async def body() -> None:
        admission = Admission(rows=64, tokens=1000, waiting=8, size=400, replicas=4)
        assert (admission.rows, admission.size) == (72, 400)
        await admission.resize(1)
        assert (admission.rows, admission.size) == (18, 100)
        await admission.resize(0)
        assert admission.rows == 18
        observe(admission, 115)
        assert admission.rows == 2 + 2  # 250 tokens hold two rows of 125
        await admission.resize(8)
        assert admission.rows == 16 + 16

    run(body)


def test_a_fleet_that_grows_lets_waiting_calls_in() -> None:
    async def body() -> None:
        admission = Admission(rows=8, replicas=2)
        await admission.resize(1)
        async with admission.admit(4):
            second = asyncio.ensure_future(_hold(admission, 4))
            await asyncio.sleep(0.01)
            assert not second.done()
            await admission.resize(2)
            await second

    run(body)


@given(
    calls=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 50)), min_size=1, max_size=12),
    rows=st.integers(1, 40),
    size=st.none() | st.integers(1, 100),
    again=st.sets(st.integers(0, 11)),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_rows_and_bytes_in_flight_stay_within_their_bounds(
    calls: list[tuple[int, int]], rows: int, size: int | None, again: set[int]
) -> None:
    async def body() -> None:
        admission = Admission(rows=rows, size=size)
        admitted: list[tuple[int, int]] = []

        async def call(number: int, of: tuple[int, int]) -> None:
            async with admission.admit(*of, again=number in again):
                admitted.append(of)
                in_flight = [sum(one) for one in zip(*admitted, strict=True)]
                assert len(admitted) == 1 or in_flight[0] <= rows
                assert len(admitted) == 1 or size is None or in_flight[1] <= size
                for _ in range(3):
                    await asyncio.sleep(0)
                admitted.remove(of)

        await asyncio.gather(*(call(n, of) for n, of in enumerate(calls)))

    run(body)
