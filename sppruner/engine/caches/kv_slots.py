"""KV cache of running requests: one slot each, with a length of its own at every layer.

`generate` pads a batch to its longest prompt at every layer. Here a slot is as long as its request:
prompts under different budgets need no padding, and where tokens are dropped inside the decoder the
later layers are as short as the drop left them.

Shapes: L layers, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from sppruner.errors import EngineError

# Layers grow in steps of so many tokens, and attention reads multiples of it: few shapes occur.
_GRAIN: Final = 64


class KVSlots:
    """The KV cache of up to `slots` requests in a decoder of `layers` layers.

    Running requests hold the first slots. `update` is what the attention modules of `transformers`
    call on a cache. Adjacent layers whose slots are equally long form a segment, which shares a
    mask; a new length inside a segment splits it for good.

    heads, width: KV heads and their width. capacity: tokens of every slot at every layer, allocated
    at once and never changed, as captured graphs need it; None lets slots and layers grow to what
    `reserve` is called for. limit: most bytes of a growing cache, see `fits`; None for no bound.
    """

    def __init__(
        self,
        *,
        layers: int,
        slots: int,
        heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int | None = None,
        limit: int | None = None,
    ) -> None:
        self._fixed = None if capacity is None else _grained(capacity)
        self._limit = limit
        self._token_bytes = 2 * heads * width * dtype.itemsize  # keys and values at one layer
        shape = (0, heads, 0, width) if self._fixed is None else (slots, heads, self._fixed, width)

        def zeros() -> list[Tensor]:
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

        self.keys, self.values = zeros(), zeros()
        # Lengths twice: on the device for masks and writes, on the host to decide shapes.
        self.lengths_LS = torch.zeros(layers, slots, dtype=torch.int64, device=device)
        self._host_lengths_LS = np.zeros((layers, slots), dtype=np.int64)
        self._slots_S = torch.arange(slots, device=device)
        # The first layer of each segment. A captured step must not change when a request prunes
        # inside the decoder, so each layer is a segment there and masks are part of the graph.
        self._starts = [0] if capacity is None else list(range(layers))
        self._extents = [0] * layers  # tokens of each slot that a step reads at each layer
        self._step_slots = 0

    @property
    def slots(self) -> int:
        return self._host_lengths_LS.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return sum(layer.nbytes for layer in (*self.keys, *self.values))

    @property
    def token_capacity(self) -> int | None:
        """Most tokens of all slots together, at all layers; None for no bound."""
        if self._fixed is not None:
            return self.slots * self._fixed
        return None if self._limit is None else self._limit // (len(self.keys) * self._token_bytes)

    def share(self, requests: int, tokens: int) -> float | None:
        """What `fits` counts of so many requests, whose longest ends with so many tokens, as a
        share of what there is; None for no bound."""
        if self._fixed is not None:
            return requests / self.slots
        if self._limit is None:
            return None
        each = len(self.keys) * _grained(tokens) * self._token_bytes
        return min(1.0, requests * each / max(1, self._limit))

    def lengths(self, slot: int) -> list[int]:
        """Tokens of a slot at each layer."""
        return [int(length) for length in self._host_lengths_LS[:, slot]]

    def fits(self, requests: int, tokens: int) -> bool:
        """Whether so many requests may run together, whose longest ends with so many tokens at
        every layer."""
        if self._fixed is not None:
            return tokens <= self._fixed
        each = len(self.keys) * _grained(tokens) * self._token_bytes
        return self._limit is None or requests * each <= self._limit

    def reserve(self, requests: int, lengths: Sequence[int]) -> None:
        """Allocates what so many requests need, whose longest ends with `lengths` tokens by layer;
        nothing else allocates.

        Requests that `fits` admits fit into the limit. Memory that only longer requests needed is
        freed where the limit requires it.
        """
        if self._fixed is not None:
            return
        held, needed = len(self.keys[0]), [_grained(length) for length in lengths]
        slots = held if requests <= held else max(requests, min(self.slots, 2 * held))
        sizes = [max(n, layer.shape[2]) for n, layer in zip(needed, self.keys, strict=True)]
        if self._limit is not None and slots * sum(sizes) * self._token_bytes > self._limit:
            slots = min(self.slots, self._limit // (sum(needed) * self._token_bytes))
            sizes = needed
        for layers in (self.keys, self.values):
            layers[:] = [_resized(one, slots, n) for one, n in zip(layers, sizes, strict=True)]

    def write(self, slot: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Fills a reserved slot with a prompt: [heads, length, width] keys and values by layer.

        Raises EngineError for a prompt that is longer than the slot.
        """
        lengths = [int(key.shape[1]) for key in keys]
        self._check(lengths)
        self._split_segments(lengths)
        for layer, (key, value, length) in enumerate(zip(keys, values, lengths, strict=True)):
            self.keys[layer][slot, :, :length] = key
            self.values[layer][slot, :, :length] = value
        self._set(slot, lengths)

    def move(self, source: int, target: int) -> None:
        """Copies a slot's content over another's."""
        lengths = self.lengths(source)
        for layer, length in enumerate(lengths):
            for held in (self.keys[layer], self.values[layer]):
                held[target, :, :length] = held[source, :, :length]
        self._set(target, lengths)

    def swap(self, one: int, other: int) -> None:
        """Exchanges the content of two slots."""
        lengths = self.lengths(one), self.lengths(other)
        for layer, length in enumerate(map(max, *lengths)):
            for held in (self.keys[layer], self.values[layer]):
                before = held[one, :, :length].clone()
                held[one, :, :length] = held[other, :, :length]
                held[other, :, :length] = before
        self._set(one, lengths[1])
        self._set(other, lengths[0])

    def release(self, slot: int) -> None:
        """Empties a slot."""
        self._set(slot, [0] * len(self.keys))

    def begin_step(self, slots: int) -> None:
        """Begins a step of one more token in each of the first `slots` slots, which `update` then
        reads. Raises EngineError if one of them is full."""
        self._step_slots = slots
        longest = (self._host_lengths_LS[:, :slots].max(axis=1) + 1).tolist()
        self._check(longest)
        ends = [*self._starts[1:], len(longest)]
        for start, end in zip(self._starts, ends, strict=True):
            extent = self._fixed or _grained(max(longest[start:end]))
            self._extents[start:end] = [extent] * (end - start)

    def starts_segment(self, layer: int) -> bool:
        return layer in self._starts

    def mask(self, layer: int) -> Tensor:
        """[slots, 1, 1, tokens] bool for the segment that starts at `layer`: the tokens that each
        slot holds, and the one that this step writes."""
        index = torch.arange(self._extents[layer], device=self.lengths_LS.device)
        return (index <= self.lengths_LS[layer, : self._step_slots, None])[:, None, None]

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes the step's keys and values [slots, heads, 1, width]; returns all of the layer."""
        slots = self._slots_S[: self._step_slots]
        at = self.lengths_LS[layer_idx, : self._step_slots]
        self.keys[layer_idx][slots, :, at] = key[:, :, 0]
        self.values[layer_idx][slots, :, at] = value[:, :, 0]
        extent = self._extents[layer_idx]
        return (
            self.keys[layer_idx][: self._step_slots, :, :extent],
            self.values[layer_idx][: self._step_slots, :, :extent],
        )

    def end_step(self, slots: int) -> None:
        """Counts the step's tokens in the first `slots` slots."""
        self.lengths_LS[:, :slots] += 1
        self._host_lengths_LS[:, :slots] += 1

    def _set(self, slot: int, lengths: Sequence[int]) -> None:
        self._host_lengths_LS[:, slot] = lengths
        self.lengths_LS[:, slot] = torch.tensor(lengths, device=self.lengths_LS.device)

    def _split_segments(self, lengths: Sequence[int]) -> None:
        changes = {i for i, (a, b) in enumerate(pairwise(lengths), start=1) if a != b}
        self._starts = sorted({*self._starts, *changes})

    def _check(self, lengths: Sequence[int]) -> None:
        for length, layer in zip(lengths, self.keys, strict=True):
            if length > layer.shape[2]:
                raise EngineError(
                    f"{length} tokens in slots of {layer.shape[2]}: raise the capacity"
                )


def _resized(states: Tensor, slots: int, tokens: int) -> Tensor:
    """[slots, heads, tokens, width] with the content of `states`, as far as it fits."""
    if states.shape[0] == slots and states.shape[2] == tokens:
        return states
    resized = states.new_zeros(slots, states.shape[1], tokens, states.shape[3])
    kept = states[:slots, :, :tokens]
    resized[: kept.shape[0], :, : kept.shape[2]] = kept
    return resized


def _grained(tokens: int) -> int:
    return -(-tokens // _GRAIN) * _GRAIN
