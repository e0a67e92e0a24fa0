"""Where the seconds of a pass go: timers put around an engine's steps from outside, for one pass.

They wrap what every engine calls: the tower, the choice of tokens, the model's forward and the step
over slots. The library holds no timers of its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Literal, TypeAlias

import torch

import sppruner.pruner
from sppruner.adapters import adapter_for
from sppruner.engine.caches.kv_slots import KVSlots
from sppruner.engine.decode import DecodeStep
from sppruner.relevance import TextRelevance

Phase: TypeAlias = Literal["vision", "pruner", "prefill", "decode", "other"]
_PHASES: Final[tuple[Phase, ...]] = ("vision", "pruner", "prefill", "decode", "other")


class Trace:
    """Of one pass. seconds: of every phase, those of a phase within another being its own alone;
    together they are the pass. kv_bytes: keys and values of one request when it held most.
    first_token: seconds from the beginning until the first token was there, or None.

    wait: for the device wherever a phase begins or ends; else what one phase queued there may be
    charged to the next.
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
    def within(self, phase: Phase) -> Iterator[None]:
        self.charge()
        # What a decode step is given is the first token.
        if phase == "decode" and self.first_token is None:
            self.first_token = self.total
        self._phases.append(phase)
        try:
            yield
        finally:
            self.charge()
            self._phases.pop()

    def charge(self) -> None:
        """The seconds since the last call go to the phase that runs."""
        now = self._now()
        self.seconds[self._phases[-1]] += now - self._since
        self._since = now

    def begin(self) -> None:
        """What has passed so far does not count."""
        self._since = self._now()

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def traced(model: Any, *, wait: bool = True) -> Iterator[Trace]:
    """Times what engines around `model` do inside the block; one block at a time. wait: for a GPU,
    so that every phase gets its own seconds."""
    trace = Trace(wait=wait and model.device.type == "cuda")

    def timed(phase: Phase) -> Callable[..., Any]:
        return lambda run, *args, **kwargs: _call(trace, phase, run, *args, **kwargs)

    def forward(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        cache = kwargs["past_key_values"]
        if not cache.get_seq_length():
            return _call(trace, "prefill", run, *args, **kwargs)
        output = _call(trace, "decode", run, *args, **kwargs)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        trace.kv_bytes = max(trace.kv_bytes, held // len(cache.layers[0].keys))
        return output

    def step(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = _call(trace, "decode", run, *args, **kwargs)
        _, tokens_N, _, cache = args
        trace.kv_bytes = max(trace.kv_bytes, _slot_bytes(cache, len(tokens_N)))
        return output

    with ExitStack() as stack:
        for owner, name, wrapper in (
            (type(adapter_for(model)), "encode", timed("vision")),
            (model.model, "get_image_features", timed("vision")),  # by `generate` itself
            (TextRelevance, "of", timed("pruner")),
            (sppruner.pruner, "token_schedules", timed("pruner")),
            (sppruner.pruner, "select", timed("pruner")),
            (sppruner.pruner, "keep", timed("pruner")),
            (model, "forward", forward),
            (DecodeStep, "__call__", step),
        ):
            stack.enter_context(_wrapped(owner, name, wrapper))
        trace.begin()
        yield trace
        trace.charge()


def _call(trace: Trace, phase: Phase, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with trace.within(phase):
        return run(*args, **kwargs)


@contextmanager
def _wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Calls of `owner.name` go to `wrapper`, with what it was in front of their arguments."""
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
    """Of the longest of the first slots, with the token that the last step wrote."""
    layers = len(cache.keys)
    tokens = max(sum(cache.lengths(slot)) + layers for slot in range(rows))
    _, heads, _, width = cache.keys[0].shape
    return 2 * tokens * heads * width * cache.keys[0].element_size()
