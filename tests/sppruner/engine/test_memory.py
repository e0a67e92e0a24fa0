"""An engine holds no more memory after ten thousand requests than after two thousand."""

from __future__ import annotations

import random
import resource
from pathlib import Path

import pytest

from sppruner.engine import BatchEngine, ContinuousEngine
from sppruner.models.loading import load_model
from tests.sppruner.engine.requests import requests
from tests.sppruner.families.folders import write_folder

CACHE_BYTES = 2**20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_is_flat_and_no_slot_is_lost_when_requests_are_cancelled(tmp_path: Path) -> None:
    loaded = load_model(str(write_folder("llava", tmp_path)))
    engine = ContinuousEngine(loaded, slots=8, cache_bytes=CACHE_BYTES)
    rng = random.Random(11)
    kinds = requests(BatchEngine(loaded), rng, 200)
    held: dict[int, tuple[int, int]] = {}
    ended = cancelled = 0
    while ended + cancelled < 10_000:
        tickets = [engine.submit(rng.choice(kinds)) for _ in range(100)]
        while engine.step():
            if rng.random() < 0.05:
                cancelled += engine.cancel(rng.choice(tickets))
            ended += sum(update.result is not None for update in engine.poll())
        ended += sum(update.result is not None for update in engine.poll())
        assert engine.in_flight == 0
        cache = engine._running.cache
        assert not any(sum(cache.lengths(slot)) for slot in range(cache.slots))
        assert engine.encoder_cache.size <= CACHE_BYTES
        assert engine.prefix_cache.size <= CACHE_BYTES
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        held[ended + cancelled] = cache.nbytes, peak
    engine.close()
    assert cancelled > 100
    early = next(size for count, size in held.items() if count >= 2_000)
    late = held[max(held)]
    assert late[0] == early[0], "slots grew"
    assert late[1] - early[1] < 64 * 2**20, "the process grew"
