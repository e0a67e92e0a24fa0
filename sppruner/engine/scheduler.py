"""Who is read next: waiting requests in order of priority and arrival, taken in groups.

A group is read in one forward, so it is bounded by tokens and by pixels, and its members must fit
together: with or without images, under one policy for positions, control requests by themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from sppruner.errors import SpecError


class Schedulable(Protocol):
    """What the schedule must know of a request.

    kind: requests of different kinds are never read together. alone: runs with its like only, when
    nothing else runs. tokens: prompt tokens that the decoder will read. patches: that the vision
    tower will.
    """

    @property
    def kind(self) -> Hashable: ...
    @property
    def alone(self) -> bool: ...
    @property
    def priority(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def patches(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLimits:
    """Of one group. tokens: rows times the longest prompt, as it is padded. patches: of all its
    images. A single request may exceed both."""

    tokens: int = 8192
    patches: int = 65_536

    def __post_init__(self) -> None:
        if min(self.tokens, self.patches) < 1:
            raise SpecError(f"prefill limits {self.tokens} and {self.patches}: give at least 1")


_W = TypeVar("_W", bound=Schedulable)


class Scheduler(Generic[_W]):
    """The waiting line. Smaller priorities go first; within one, first come, first served."""

    def __init__(self, limits: PrefillLimits) -> None:
        self._limits = limits
        self._lines: dict[int, deque[_W]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[_W]:
        """In the order in which they would be taken if all fitted together."""
        for priority in sorted(self._lines):
            yield from self._lines[priority]

    def add(self, request: _W) -> None:
        self._lines.setdefault(request.priority, deque()).append(request)

    def remove(self, request: _W) -> None:
        self._lines[request.priority].remove(request)

    def first(self) -> _W | None:
        return next(iter(self), None)

    def take(self, rows: int, fits: Callable[[list[_W]], bool] = bool) -> list[_W]:
        """The first request and those that can be read with it, `rows` at most; nobody where it
        does not fit.

        fits: whether a group may run, as far as it depends on who else does. Requests of another
        kind keep their place: the first of them leads the next group. One that does not fit holds
        up those behind it, or it would wait for ever.
        """
        group: list[_W] = []
        for request in list(self):
            if len(group) == rows:
                break
            if group and request.kind != group[0].kind:
                continue
            # Those that run by themselves are timed together, however many forwards they take.
            together = not group or request.alone or self._within([*group, request])
            if not together or not fits([*group, request]):
                break
            group.append(request)
        for request in group:
            self.remove(request)
        return group

    def parts(self, group: Sequence[_W]) -> Iterator[list[_W]]:
        """A group in as many as the limits ask for, in its order."""
        part: list[_W] = []
        for request in group:
            if part and not self._within([*part, request]):
                yield part
                part = []
            part.append(request)
        if part:
            yield part

    def _within(self, group: Sequence[_W]) -> bool:
        padded = len(group) * max(request.tokens for request in group)
        patches = sum(request.patches for request in group)
        return padded <= self._limits.tokens and patches <= self._limits.patches
