"""The prefill scheduler: waiting requests in order of priority and arrival, taken in groups.

A group is prefilled in one forward, so its tokens and pixels are bounded and its members are of one
kind: with or without images, under one policy for positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from sppruner.errors import SpecError


class Schedulable(Protocol):
    """What the scheduler reads of a request."""

    @property
    def kind(self) -> Hashable:
        """Requests of different kinds never share a group."""
        ...

    @property
    def priority(self) -> int:
        """Smaller priorities are taken first."""
        ...

    @property
    def tokens(self) -> int:
        """Prompt tokens that enter the decoder."""
        ...

    @property
    def patches(self) -> int:
        """Patches that enter the vision tower."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLimits:
    """Bounds of one group; a single request may exceed both."""

    tokens: int = 8192
    """Most tokens of the padded batch: requests times the longest prompt; at least 1."""

    patches: int = 65_536
    """Most patches of all images together; at least 1."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.patches) < 1:
            raise SpecError(f"prefill limits {self.tokens} and {self.patches}: give at least 1")


_S = TypeVar("_S", bound=Schedulable)


class Scheduler(Generic[_S]):
    """The queue of waiting requests: smaller priorities first, FIFO within one priority."""

    def __init__(self, limits: PrefillLimits) -> None:
        self._limits = limits
        self._queues: dict[int, deque[_S]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[_S]:
        """In the order in which `take` would admit them if all fitted together."""
        for priority in sorted(self._queues):
            yield from self._queues[priority]

    def add(self, request: _S) -> None:
        self._queues.setdefault(request.priority, deque()).append(request)

    def remove(self, request: _S) -> None:
        self._queues[request.priority].remove(request)

    @property
    def priorities(self) -> list[int]:
        """Of the requests that wait, each once, in order."""
        return sorted(priority for priority, queue in self._queues.items() if queue)

    def take(
        self,
        slots: int,
        fits: Callable[[list[_S]], bool] = bool,
        *,
        priority: int | None = None,
        most_tokens: int | None = None,
    ) -> list[_S]:
        """Removes and returns the first request and those that can be prefilled with it, at most
        `slots`; none if that first one does not fit.

        fits: whether a group may run beside the requests that are running. priority: of the group;
        None for the most urgent that wait. most_tokens: a bound
        below that of the limits. A request of another kind keeps its place: the first of them leads
        the next group. A request that does not fit blocks those after it, or it would starve. Those
        of another priority have a group of their own, or a few urgent ones would wait for many.
        """
        group: list[_S] = []
        for request in self if priority is None else self._queues.get(priority, ()):
            if len(group) == slots or (group and request.priority != group[0].priority):
                break
            if group and request.kind != group[0].kind:
                continue
            if group and not self._within([*group, request], most_tokens):
                break
            if not fits([*group, request]):
                break
            group.append(request)
        for request in group:
            self.remove(request)
        return group

    def _within(self, group: Sequence[_S], most_tokens: int | None) -> bool:
        tokens = min(self._limits.tokens, most_tokens or self._limits.tokens)
        patches = sum(request.patches for request in group)
        return padded_tokens(group) <= tokens and patches <= self._limits.patches


def padded_tokens(group: Sequence[Schedulable]) -> int:
    """Tokens of a group's prefill: its requests times its longest prompt."""
    return len(group) * max(request.tokens for request in group)
