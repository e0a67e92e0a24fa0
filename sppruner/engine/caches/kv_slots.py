"""Keys and values of running requests: a slot each, with a length of its own at every layer.

`generate` pads a batch to its longest row at every layer. Here a slot holds what its request really
has: prompts under different budgets lie side by side without padding, and where tokens are dropped
inside the decoder the later layers are as short as the drop left them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from sppruner.errors import EngineError

# Layers grow by so many places, and attention reads multiples of them: few shapes occur.
_GRAIN: Final = 64


class KVSlots:
    """The KV cache of up to `slots` requests in a decoder of `layers` layers.

    Running requests hold the first slots. `update` is what attention modules of `transformers` call
    on a cache. Layers whose slots are equally long form a segment, which shares a mask; a new
    length inside one divides it, for good.

    heads, width: KV heads and their width. capacity: places of every slot at every layer, allocated
    at once and never changed, as captured graphs need it; with None slots and layers grow to what
    `prepare` was asked for. limit: bytes that such a cache may grow to, see `fits`.
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
        self._place_bytes = 2 * heads * width * dtype.itemsize  # of a token at one layer
        shape = (0, heads, 0, width) if self._fixed is None else (slots, heads, self._fixed, width)

        def places() -> list[Tensor]:
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

        self.keys, self.values = places(), places()
        # Twice: on the device for masks and writes, and here, where shapes are decided.
        self.lengths_LS = torch.zeros(layers, slots, dtype=torch.int64, device=device)
        self._known_LS = np.zeros((layers, slots), dtype=np.int64)
        self._slots_S = torch.arange(slots, device=device)
        # The first layer of each segment. A captured step must not change with the first stage that
        # comes along: each layer is a segment there, and masks are part of the graph.
        self._starts = [0] if capacity is None else list(range(layers))
        self._extents = [0] * layers  # places that a step reads at each layer
        self._rows = 0

    @property
    def slots(self) -> int:
        return self._known_LS.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held, used or not."""
        return sum(layer.nbytes for layer in (*self.keys, *self.values))

    @property
    def room(self) -> int | None:
        """Tokens that all slots may hold together, at all layers; None for any number."""
        if self._fixed is not None:
            return self.slots * self._fixed
        return None if self._limit is None else self._limit // (len(self.keys) * self._place_bytes)

    def lengths(self, slot: int) -> list[int]:
        """Tokens of a slot at each layer."""
        return [int(length) for length in self._known_LS[:, slot]]

    def fits(self, rows: int, tokens: int) -> bool:
        """Whether so many requests may run side by side, the longest of so many tokens in the end,
        at all layers."""
        if self._fixed is not None:
            return tokens <= self._fixed
        each = len(self.keys) * _grained(tokens) * self._place_bytes
        return self._limit is None or rows * each <= self._limit

    def prepare(self, rows: int, lengths: Sequence[int]) -> None:
        """Takes all memory that `rows` requests need, of which the longest has so many tokens at
        each layer in the end; nothing else does. They are requests that `fits`. Places that only
        longer ones needed are given back where the limit asks for it."""
        if self._fixed is not None:
            return
        held, needed = len(self.keys[0]), [_grained(length) for length in lengths]
        slots = held if rows <= held else max(rows, min(self.slots, 2 * held))
        places = [max(n, layer.shape[2]) for n, layer in zip(needed, self.keys, strict=True)]
        if self._limit is not None and slots * sum(places) * self._place_bytes > self._limit:
            slots = min(self.slots, self._limit // (sum(needed) * self._place_bytes))
            places = needed
        for layers in (self.keys, self.values):
            layers[:] = [_resized(one, slots, n) for one, n in zip(layers, places, strict=True)]

    def write(self, slot: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Fills a prepared slot with a prompt: [heads, length, width] keys and values by layer.

        Raises EngineError where it is longer than what the slot holds.
        """
        lengths = [int(key.shape[1]) for key in keys]
        self._check(lengths)
        self._divide(lengths)
        for layer, (key, value, length) in enumerate(zip(keys, values, lengths, strict=True)):
            self.keys[layer][slot, :, :length] = key
            self.values[layer][slot, :, :length] = value
        self._set(slot, lengths)

    def move(self, source: int, target: int) -> None:
        """Puts a slot's content where another was."""
        lengths = self.lengths(source)
        for layer, length in enumerate(lengths):
            for held in (self.keys[layer], self.values[layer]):
                held[target, :, :length] = held[source, :, :length]
        self._set(target, lengths)

    def release(self, slot: int) -> None:
        """Forgets a slot's content."""
        self._set(slot, [0] * len(self.keys))

    def begin(self, rows: int) -> None:
        """Begins a step of one more token in each of the first `rows` slots; `update` then reads
        these. Raises EngineError where one of them is full."""
        self._rows = rows
        longest = (self._known_LS[:, :rows].max(axis=1) + 1).tolist()
        self._check(longest)
        ends = [*self._starts[1:], len(longest)]
        for start, end in zip(self._starts, ends, strict=True):
            extent = self._fixed or _grained(max(longest[start:end]))
            self._extents[start:end] = [extent] * (end - start)

    def starts_segment(self, layer: int) -> bool:
        return layer in self._starts

    def mask(self, layer: int) -> Tensor:
        """[rows, 1, 1, places] bool for the segment that starts at `layer`: the tokens that are
        there, and the one that this step writes."""
        places = torch.arange(self._extents[layer], device=self.lengths_LS.device)
        return (places <= self.lengths_LS[layer, : self._rows, None])[:, None, None]

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes the step's keys and values [rows, heads, 1, width]; returns all of the layer's."""
        rows = self._slots_S[: self._rows]
        at = self.lengths_LS[layer_idx, : self._rows]
        self.keys[layer_idx][rows, :, at] = key[:, :, 0]
        self.values[layer_idx][rows, :, at] = value[:, :, 0]
        extent = self._extents[layer_idx]
        return (
            self.keys[layer_idx][: self._rows, :, :extent],
            self.values[layer_idx][: self._rows, :, :extent],
        )

    def end(self, rows: int) -> None:
        """Counts the step's tokens, in the first `rows` slots."""
        self.lengths_LS[:, :rows] += 1
        self._known_LS[:, :rows] += 1

    def _set(self, slot: int, lengths: Sequence[int]) -> None:
        self._known_LS[:, slot] = lengths
        self.lengths_LS[:, slot] = torch.tensor(lengths, device=self.lengths_LS.device)

    def _divide(self, lengths: Sequence[int]) -> None:
        changes = {i for i, (a, b) in enumerate(pairwise(lengths), start=1) if a != b}
        self._starts = sorted({*self._starts, *changes})

    def _check(self, lengths: Sequence[int]) -> None:
        for length, layer in zip(lengths, self.keys, strict=True):
            if length > layer.shape[2]:
                raise EngineError(
                    f"{length} tokens in slots of {layer.shape[2]}: raise the capacity"
                )


def _resized(states: Tensor, slots: int, places: int) -> Tensor:
    """[slots, heads, places, width] with what was there, as far as it finds room."""
    if states.shape[0] == slots and states.shape[2] == places:
        return states
    resized = states.new_zeros(slots, states.shape[1], places, states.shape[3])
    kept = states[:slots, :, :places]
    resized[: kept.shape[0], :, : kept.shape[2]] = kept
    return resized


def _grained(places: int) -> int:
    return -(-places // _GRAIN) * _GRAIN
