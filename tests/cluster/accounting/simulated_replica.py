"""When a replica answers rows, by a model of continuous batching: simulated seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Pace = Callable[[float], float]
"""Seconds that one second of work takes, as of a time."""


def answer_rows(
    lengths: Sequence[int],
    *,
    prefill: float,
    step: float,
    slots: int,
    began: float = 0.0,
    pace: Pace = lambda now: 1.0,
) -> list[float]:
    """When rows of so many tokens are answered that are all there at once. A row that takes a slot
    has a prefill of its own, for which the others wait; a step gives every running row a token."""
    now, waiting, running = began, list(enumerate(lengths)), dict[int, int]()
    waiting.reverse()
    ended = [0.0] * len(lengths)
    while waiting or running:
        if waiting and len(running) < slots:
            number, length = waiting.pop()
            running[number] = length
            now += prefill * pace(now)
            continue
        now += step * pace(now)
        for number in [number for number, left in running.items() if left == 1]:
            ended[number] = now
        running = {number: left - 1 for number, left in running.items() if left > 1}
    return ended
