"""Admission: rows in flight are bounded in rows until their length is known, then in tokens."""

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


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    rows=st.integers(1, 40),
    exclusive=st.sets(st.integers(0, 11)),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_rows_in_flight_stay_within_the_bound_and_exclusive_calls_run_exclusively(
    sizes: list[int], rows: int, exclusive: set[int]
) -> None:
    async def body() -> None:
        admission = Admission(rows=rows)
        admitted: list[int] = []

        async def call(number: int, size: int) -> None:
            async with admission.admit(size, exclusive=number in exclusive):
                admitted.append(size)
                assert len(admitted) == 1 or (sum(admitted) <= rows and number not in exclusive)
                for _ in range(3):
                    await asyncio.sleep(0)
                    assert number not in exclusive or len(admitted) == 1
                admitted.remove(size)

        await asyncio.gather(*(call(n, size) for n, size in enumerate(sizes)))

    run(body)
