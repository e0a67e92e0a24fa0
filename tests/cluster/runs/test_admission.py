"""Work on its way to replicas: rows until their length is known, tokens from then on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cluster.protocol import LabelRequest, RowAnswer
from cluster.runs.admission import Admission
from sppruner.engine import SamplingParams


def learn(credits: Admission, *prompt_tokens: int, new: int = 10, error: str | None = None) -> None:
    generation = SamplingParams(max_new_tokens=new)
    calls = [
        LabelRequest(id=str(n), prompt="p", generation=generation)
        for n in range(len(prompt_tokens))
    ]
    credits.learn(
        calls,
        [
            RowAnswer(id=call.id, prompt_tokens=tokens, error_code=error)
            for call, tokens in zip(calls, prompt_tokens, strict=True)
        ],
    )


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))


def test_until_a_row_is_answered_only_rows_are_counted() -> None:
    credits = Admission(rows=48, tokens=100)
    assert credits.rows == 48
    learn(credits, 0, error="image_missing")
    assert credits.rows == 48


def test_long_rows_are_fewer_and_short_rows_no_more_than_the_slots_take() -> None:
    credits = Admission(rows=48, tokens=1000, waiting=5)
    learn(credits, 90, 90)
    assert credits.rows == 10 + 5  # 1,000 tokens of rows of 90 and an answer of 10
    learn(credits, *[0] * 100)
    assert credits.rows == 48 + 5


def test_without_a_bound_on_tokens_length_does_not_matter() -> None:
    credits = Admission(rows=48)
    learn(credits, 100_000)
    assert credits.rows == 48


def test_the_length_is_that_of_the_last_rows() -> None:
    """A corpus in the order of its sizes has long rows first, and then none."""
    credits = Admission(rows=48, tokens=1000)
    for _ in range(1000):
        learn(credits, *[990] * 16)
    assert credits.rows == 1
    for _ in range(500):
        learn(credits, *[0] * 16)
    assert credits.rows == 48


def test_a_call_larger_than_all_credits_goes_by_itself() -> None:
    async def body() -> None:
        credits = Admission(rows=1)
        inside = 0

        async def call() -> None:
            nonlocal inside
            async with credits.place(16):
                inside += 1
                assert inside == 1
                await asyncio.sleep(0)
                inside -= 1

        await asyncio.gather(*(call() for _ in range(8)))

    run(body)


def test_nobody_overtakes_a_large_call() -> None:
    """Small calls fit into every gap: a call of control rows would wait for the last of them."""

    async def body() -> None:
        credits = Admission(rows=8)
        started: list[int] = []

        async def call(number: int, rows: int) -> None:
            async with credits.place(rows):
                started.append(number)
                await asyncio.sleep(0.001 * (1 + number % 3))

        sizes = [2, 2, 2, 8, *[2] * 12]
        await asyncio.gather(*(call(number, rows) for number, rows in enumerate(sizes)))
        assert started == list(range(len(sizes)))

    run(body)


def test_who_stops_waiting_holds_up_nobody() -> None:
    async def body() -> None:
        credits = Admission(rows=4)
        async with credits.place(4):
            first = asyncio.ensure_future(_hold(credits, 4))
            second = asyncio.ensure_future(_hold(credits, 4))
            await asyncio.sleep(0)
            first.cancel()
        await second
        assert first.cancelled()

    run(body)


async def _hold(credits: Admission, rows: int) -> None:
    async with credits.place(rows):
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
        credits = Admission(rows=rows)
        inside: list[int] = []

        async def call(number: int, size: int) -> None:
            async with credits.place(size, alone=number in alone):
                inside.append(size)
                assert len(inside) == 1 or (sum(inside) <= rows and number not in alone)
                for _ in range(3):
                    await asyncio.sleep(0)
                    assert number not in alone or len(inside) == 1
                inside.remove(size)

        await asyncio.gather(*(call(n, size) for n, size in enumerate(sizes)))

    run(body)
