"""Phase timers: wrappers around an engine's steps for the duration of one pass.

They wrap what every engine calls: the vision tower, token selection, the model's forward and the
decode step over slots. The library itself has no timers. `list_hooks` names the wrapped attributes;
a renamed one raises before anything is timed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Literal, TypeAlias, cast

import torch

import sppruner.pruner
from sppruner.adapters import adapter_for
from sppruner.engine.caches.kv_slots import KVSlots
from sppruner.engine.decode import DecodeStep
from sppruner.relevance import TextRelevance

Phase: TypeAlias = Literal["vision", "pruner", "prefill", "decode", "other"]
_PHASES: Final[tuple[Phase, ...]] = ("vision", "pruner", "prefill", "decode", "other")


class PhaseTimes:
    """Times of one pass.

    seconds: by phase; a nested phase is not counted in the outer one, so they sum to the pass.
    kv_bytes: largest KV cache of one request. first_token: seconds from the start to the first
    token, None before it.

    wait: synchronise the device where a phase begins or ends; otherwise work that one phase queued
    may be charged to the next.
    """

    def __init__(self, *, wait: bool) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(_PHASES, 0.0)
        self.kv_bytes = 0
        self.first_token: float | None = None
        self._wait = wait
        self._phases: list[Phase] = ["other"]
        self._since = self._now()

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        self.charge()
        # The first decode step receives the first token.
        if phase == "decode" and self.first_token is None:
            self.first_token = self.total
        self._phases.append(phase)
        try:
            yield
        finally:
            self.charge()
            self._phases.pop()

    def charge(self) -> None:
        """Charges the seconds since the last call to the current phase."""
        now = self._now()
        self.seconds[self._phases[-1]] += now - self._since
        self._since = now

    def restart(self) -> None:
        """Drops the time that has passed since the last charge."""
        self._since = self._now()

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize()
        return time.perf_counter()


def list_hooks(model: Any) -> list[tuple[Any, str, Phase | Literal["forward", "step"]]]:
    """Owner, attribute and charged phase of everything the timers wrap; `forward` and `step` tell
    prefill from decode themselves."""
    return [
        (type(adapter_for(model)), "encode", "vision"),
        (model.model, "get_image_features", "vision"),  # called by `generate` itself
        (TextRelevance, "add_relevance", "pruner"),
        (sppruner.pruner, "token_schedules", "pruner"),
        (sppruner.pruner, "select", "pruner"),
        (sppruner.pruner, "keep", "pruner"),
        (model, "forward", "forward"),
        (DecodeStep, "__call__", "step"),
    ]


@contextmanager
def time_phases(model: Any, *, wait: bool = True) -> Iterator[PhaseTimes]:
    """Times what engines on `model` do inside the block; blocks must not overlap. wait: synchronise
    a GPU so that each phase is charged its own work. Raises AttributeError for a hook that is gone.
    """
    times = PhaseTimes(wait=wait and model.device.type == "cuda")

    def charge_to(phase: Phase) -> Callable[..., Any]:
        return lambda run, *args, **kwargs: _call(times, phase, run, *args, **kwargs)

    def forward(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        cache = kwargs["past_key_values"]
        if not cache.get_seq_length():
            return _call(times, "prefill", run, *args, **kwargs)
        output = _call(times, "decode", run, *args, **kwargs)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        times.kv_bytes = max(times.kv_bytes, held // len(cache.layers[0].keys))
        return output

    def step(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = _call(times, "decode", run, *args, **kwargs)
        _, tokens_N, _, cache, *_ = args
        times.kv_bytes = max(times.kv_bytes, _slot_bytes(cache, len(tokens_N)))
        return output

    with ExitStack() as stack:
        wrappers = {"forward": forward, "step": step}
        for owner, name, kind in list_hooks(model):
            wrapper = wrappers.get(kind) or charge_to(cast(Phase, kind))
            stack.enter_context(_wrap(owner, name, wrapper))
        times.restart()
        yield times
        times.charge()


def _call(
    times: PhaseTimes, phase: Phase, run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with times.measure(phase):
        return run(*args, **kwargs)


@contextmanager
def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Redirects calls of `owner.name` to `wrapper`, with the original as its first argument."""
    before, own = getattr(owner, name), name in vars(owner)

    @functools.wraps(before)
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(before, *args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _slot_bytes(cache: KVSlots, rows: int) -> int:
    """KV cache bytes of the longest of the first slots, with the token of the last step."""
    layers = len(cache.keys)
    tokens = max(sum(cache.lengths(slot)) + layers for slot in range(rows))
    _, heads, _, width = cache.keys[0].shape
    return 2 * tokens * heads * width * cache.keys[0].element_size()
