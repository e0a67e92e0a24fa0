"""Work on its way to replicas: rows until their length is known, tokens from then on."""

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


def learn(
    admission: Admission, *prompt_tokens: int, new: int = 10, error: str | None = None
) -> None:
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


def test_until_a_row_is_answered_only_rows_are_counted() -> None:
    admission = Admission(rows=48, tokens=100)
    assert admission.rows == 48
    learn(admission, 0, error="image_missing")
    assert admission.rows == 48


def test_long_rows_are_fewer_and_short_rows_no_more_than_the_slots_take() -> None:
    admission = Admission(rows=48, tokens=1000, waiting=5)
    learn(admission, 90, 90)
    assert admission.rows == 10 + 5  # 1,000 tokens of rows of 90 and an answer of 10
    learn(admission, *[0] * 100)
    assert admission.rows == 48 + 5


def test_without_a_bound_on_tokens_length_does_not_matter() -> None:
    admission = Admission(rows=48)
    learn(admission, 100_000)
    assert admission.rows == 48


def test_the_length_is_that_of_the_last_rows() -> None:
    """A corpus in the order of its sizes has long rows first, and then none."""
    admission = Admission(rows=48, tokens=1000)
    for _ in range(1000):
        learn(admission, *[990] * 16)
    assert admission.rows == 1
    for _ in range(500):
        learn(admission, *[0] * 16)
    assert admission.rows == 48


def test_a_call_larger_than_all_credits_goes_by_itself() -> None:
    async def body() -> None:
        admission = Admission(rows=1)
        inside = 0

        async def call() -> None:
            nonlocal inside
            async with admission.admit(16):
                inside += 1
                assert inside == 1
                await asyncio.sleep(0)
                inside -= 1

        await asyncio.gather(*(call() for _ in range(8)))

    run(body)


def test_nobody_overtakes_a_large_call() -> None:
    """Small calls fit into every gap: a call of control rows would wait for the last of them."""

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


def test_who_stops_waiting_holds_up_nobody() -> None:
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
    alone=st.sets(st.integers(0, 11)),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_rows_on_their_way_keep_within_bounds_and_who_is_alone_is_alone(
    sizes: list[int], rows: int, alone: set[int]
) -> None:
    async def body() -> None:
        admission = Admission(rows=rows)
        inside: list[int] = []

        async def call(number: int, size: int) -> None:
            async with admission.admit(size, exclusive=number in alone):
                inside.append(size)
                assert len(inside) == 1 or (sum(inside) <= rows and number not in alone)
                for _ in range(3):
                    await asyncio.sleep(0)
                    assert number not in alone or len(inside) == 1
                inside.remove(size)

        await asyncio.gather(*(call(n, size) for n, size in enumerate(sizes)))

    run(body)
