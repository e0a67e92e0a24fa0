"""Slots hold what was written, each at its own length, and grow without losing content."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sppruner.engine.caches.kv_slots import KVSlots
from sppruner.errors import EngineError

LAYERS, SLOTS, HEADS, WIDTH = 3, 4, 2, 5


def cache(capacity: int | None = None, limit: int | None = None) -> KVSlots:
    return KVSlots(
        layers=LAYERS,
        slots=SLOTS,
        heads=HEADS,
        width=WIDTH,
        dtype=torch.float32,
        device=torch.device("cpu"),
        capacity=capacity,
        limit=limit,
    )


def states(seed: int, lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(HEADS, length, WIDTH, generator=generator) for length in lengths]


Lengths = st.lists(st.integers(1, 90), min_size=LAYERS, max_size=LAYERS)


@given(
    prompts=st.lists(Lengths, min_size=1, max_size=SLOTS),
    steps=st.integers(0, 70),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_every_slot_holds_its_prompt_and_its_own_steps_at_every_layer(
    prompts: list[list[int]], steps: int, data: st.DataObject
) -> None:
    slots = cache()
    expected: list[list[Tensor]] = []
    for number, lengths in enumerate(prompts):
        needs = [[length + steps for length in one] for one in prompts[: number + 1]]
        slots.reserve(number + 1, [max(layer) for layer in zip(*needs, strict=True)])
        keys = states(number, lengths)
        slots.write(number, keys, [-key for key in keys])
        expected.append(keys)
    for step in range(steps):
        rows = len(expected)
        slots.begin_step(rows)
        for layer in range(LAYERS):
            new = (
                torch.full((rows, HEADS, 1, WIDTH), float(step))
                + torch.arange(rows)[:, None, None, None]
            )
            read, values = slots.update(new, -new, layer)
            assert torch.equal(read, -values)
            if slots.starts_segment(layer):
                mask = slots.mask(layer)
            for row, held in enumerate(expected):
                held[layer] = torch.cat([held[layer], new[row]], dim=1)
                visible = mask[row, 0, 0]
                assert torch.equal(read[row][:, visible], held[layer])
        slots.end_step(rows)
    if len(expected) > 1:
        freed = data.draw(st.integers(0, len(expected) - 2))
        slots.move(len(expected) - 1, freed)
        expected[freed] = expected[-1]
    for row, held in enumerate(expected):
        assert slots.lengths(row) == [layer.shape[1] for layer in held]
        for layer, kept in enumerate(held):
            assert torch.equal(slots.keys[layer][row, :, : kept.shape[1]], kept)


def test_layers_after_a_stage_take_no_more_memory_than_they_need() -> None:
    plain, staged = cache(), cache()
    plain.reserve(1, [640] * LAYERS)
    staged.reserve(1, [640, 64, 64])
    plain.write(0, *[states(0, [640] * LAYERS)] * 2)
    staged.write(0, *[states(0, [640, 64, 64])] * 2)
    assert staged.nbytes * 640 * 3 == plain.nbytes * (640 + 64 + 64)


def test_a_fixed_capacity_is_allocated_at_once_and_never_exceeded() -> None:
    slots = cache(capacity=100)
    held = slots.nbytes
    slots.write(0, *[states(0, [128] * LAYERS)] * 2)
    assert slots.nbytes == held
    with pytest.raises(EngineError, match="raise the capacity"):
        slots.begin_step(1)
    with pytest.raises(EngineError, match="129 tokens in slots of 128"):
        slots.write(1, *[states(0, [129] * LAYERS)] * 2)


TOKEN = 2 * LAYERS * HEADS * WIDTH * 4  # bytes


@given(
    groups=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=SLOTS), max_size=12),
    grains=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_requests_that_fit_stay_within_the_limit_and_lose_nothing(
    groups: list[list[int]], grains: int
) -> None:
    """Groups of requests run one after another, each when the previous one has ended."""
    limit = grains * 64 * TOKEN
    slots = cache(limit=limit)
    for group in groups:
        if not slots.fits(len(group), max(group)):
            assert len(group) * (max(group) + 63) * TOKEN > limit, "refused without need"
            continue
        for rows in range(1, len(group) + 1):
            slots.reserve(rows, [max(group)] * LAYERS)
            keys = states(rows, [group[rows - 1]] * LAYERS)
            slots.write(rows - 1, keys, keys)
            assert slots.nbytes <= limit
        if max(group) % 64:
            slots.begin_step(len(group))
        assert slots.nbytes <= limit
        for row, length in enumerate(group):
            for layer, kept in enumerate(states(row + 1, [length] * LAYERS)):
                assert torch.equal(slots.keys[layer][row, :, :length], kept)
        for row in range(len(group)):
            slots.release(row)


def test_memory_that_only_a_long_request_needed_is_freed_for_more_slots() -> None:
    slots = cache(limit=4 * 64 * TOKEN)
    assert slots.fits(1, 256)
    assert not slots.fits(2, 256)
    slots.reserve(1, [256] * LAYERS)
    slots.write(0, *[states(0, [256] * LAYERS)] * 2)
    slots.release(0)
    assert slots.fits(4, 64)
    slots.reserve(4, [64] * LAYERS)
    for slot in range(4):
        slots.write(slot, *[states(slot, [63] * LAYERS)] * 2)
    slots.begin_step(4)
    assert slots.nbytes <= 4 * 64 * TOKEN


def test_only_reserving_allocates_and_only_where_more_is_needed() -> None:
    slots = cache(limit=8 * 64 * TOKEN)
    slots.reserve(2, [100, 64, 64])
    held = [layer.data_ptr() for layer in (*slots.keys, *slots.values)]
    slots.write(0, *[states(0, [90, 50, 50])] * 2)
    slots.reserve(2, [40] * LAYERS)  # shorter ones fit, so nothing is reallocated
    slots.write(1, *[states(1, [40] * LAYERS)] * 2)
    for _ in range(10):
        slots.begin_step(2)
        slots.end_step(2)
    assert [layer.data_ptr() for layer in (*slots.keys, *slots.values)] == held
    with pytest.raises(EngineError, match="129 tokens in slots of 128"):
        slots.write(0, *[states(0, [129, 10, 10])] * 2)
