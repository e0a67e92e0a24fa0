"""Work on its way to replicas: rows until their length is known, tokens from then on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cluster.calls import RowAnswer, RowCall
from cluster.credits import Credits
from sppruner.engine import Generation


def learn(credits: Credits, *prompt_tokens: int, new: int = 10, error: str | None = None) -> None:
    generation = Generation(max_new_tokens=new)
    calls = [
        RowCall(id=str(n), prompt="p", generation=generation) for n in range(len(prompt_tokens))
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
    credits = Credits(rows=48, tokens=100)
    assert credits.rows == 48
    learn(credits, 0, error="image_missing")
    assert credits.rows == 48


def test_long_rows_are_fewer_and_short_rows_no_more_than_the_slots_take() -> None:
    credits = Credits(rows=48, tokens=1000)
    learn(credits, 90, 90)
    assert credits.rows == 10  # 1,000 tokens of rows of 90 and an answer of 10
    learn(credits, *[0] * 100)
    assert credits.rows == 48


def test_without_a_bound_on_tokens_length_does_not_matter() -> None:
    credits = Credits(rows=48)
    learn(credits, 100_000)
    assert credits.rows == 48


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_so_many_calls_are_let_through_however_large_they_are(calls: int) -> None:
    """Or rows longer than all credits would wait for ever, and a replica between its calls."""

    async def body() -> None:
        credits = Credits(rows=1, calls=calls)
        inside = 0

        async def call() -> None:
            nonlocal inside
            async with credits.place(16):
                inside += 1
                most.append(inside)
                await asyncio.sleep(0)
                inside -= 1

        most: list[int] = []
        await asyncio.gather(*(call() for _ in range(8)))
        assert max(most) == calls

    run(body)


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
        credits = Credits(rows=rows)
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
