"""Ten thousand mixed requests, many of them cancelled or bad: each has one end, no block of the KV
cache is lost, and memory is flat."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sppruner.engine import Request, SamplingParams
from sppruner.spec import Budget, PruneSpec
from tests.sppruner.integrations.vllm.requests import SPECS, facts, questions
from tests.sppruner.integrations.vllm.test_engine import finish, free_blocks

REQUESTS, SCENES = 10_000, 400
MIXED = [*SPECS, PruneSpec(method="prunesid", budget=Budget(ratio=0.222, spread=0.5))]
BAD: tuple[dict[str, Any], ...] = (
    {"prompt": "word " * 5000},
    {"prompt": "what is <image> ?"},
    {"spec": PruneSpec(method="fastv", budget=Budget(ratio=0.5))},
    {"generation": SamplingParams(max_new_tokens=100_000)},
)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def draw(rng: random.Random, scenes: list[Request], number: int) -> tuple[Request, bool]:
    """A request, and whether it is bad."""
    request = replace(
        rng.choice(scenes),
        id=str(number),
        spec=rng.choice(MIXED),
        priority=rng.choice([-1, 0, 0, 0]),
        stream=rng.random() < 0.2,
        generation=SamplingParams(
            max_new_tokens=rng.choice([1, 4, 12]),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            seed=number,
        ),
    )
    if rng.random() < 0.1:
        request = replace(request, images=())
    bad = rng.random() < 0.03
    return (replace(request, **rng.choice(BAD)), True) if bad else (request, False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_request_has_one_end_and_nothing_is_lost(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava", slots=16)
    scenes = questions(SCENES)
    probe = questions(8, SPECS[1])
    before = [facts(result) for result in engine.run(probe)]
    engine.clear_caches()
    free = free_blocks(engine)
    rng = random.Random(7)
    ends, bad, cancelled = Counter[int](), set[int](), set[int]()
    wrong: list[Any] = []
    held: dict[int, int] = {}

    def note(updates: list[Any]) -> None:
        for update in updates:
            if update.result is not None:
                ends[update.ticket] += 1
                if (update.result.error_code is not None) != (update.ticket in bad):
                    wrong.append(update.result)

    for number in range(0, REQUESTS, 100):
        tickets = []
        for offset in range(100):
            request, is_bad = draw(rng, scenes, number + offset)
            tickets.append(engine.submit(request))
            if is_bad:
                bad.add(tickets[-1])
        # Every tenth hundred is a storm: nearly all are cancelled, in whatever state they are.
        share = 0.9 if number % 1000 == 0 else 0.05
        doomed = [ticket for ticket in tickets if rng.random() < share]
        rng.shuffle(doomed)
        while engine.step():
            burst = rng.randrange(16 if share > 0.5 else 4)
            for ticket in doomed[:burst]:
                cancelled |= {ticket} if engine.cancel(ticket) else set()
            del doomed[:burst]
            note(engine.poll())
        note(engine.poll())
        assert engine.in_flight == 0
        assert set(tickets) == {t for t in tickets if t in ends or t in cancelled}
        held[number] = resident_bytes()
    assert not wrong, wrong[:3]
    assert set(ends.values()) == {1}
    assert not cancelled & ends.keys()
    assert len(cancelled) > 500
    engine.clear_caches()
    assert free_blocks(engine) == free
    assert [facts(result) for result in engine.run(probe)] == before
    assert not finish(engine)
    assert held[max(held)] - held[3000] < 64 * 2**20, held
