"""Which rows of a unit are control rows: answered both pruned and dense, to measure the saving."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


class ControlSample:
    """A share of a run's rows, the same at every attempt.

    Control rows of a unit fill whole calls of one row per slot, or of the whole unit if that is
    smaller: seconds measured on a batch of two say nothing about batches of sixteen. The share
    holds over many units: the fraction of a call that it leaves over is drawn by hash. The run's
    first unit always has one call.
    """

    def __init__(self, run_id: str, *, share: float, first_unit: str) -> None:
        """share: of the rows, in [0, 1]; 0 draws none. first_unit: the run's first."""
        self._run_id = run_id
        self._share = share
        self._first_unit = first_unit

    def draw(self, unit: str, rows: Sequence[int], *, slots: int) -> frozenset[int]:
        """The control rows of a unit. rows: numbers of those that can be answered. slots: of a
        replica, the length of a full call."""
        if not self._share or not rows:
            return frozenset()
        size = min(slots, len(rows))
        calls, rest = divmod(self._share * len(rows) / size, 1)
        calls += self._hash(unit, "calls") < rest
        if unit == self._first_unit:
            calls = max(calls, 1)
        drawn = sorted(rows, key=lambda number: self._hash(unit, number))
        return frozenset(drawn[: int(calls) * size])

    def _hash(self, *what: object) -> float:
        """A number in [0, 1) that depends on the run and on `what` alone."""
        text = "\0".join(map(str, (self._run_id, *what)))
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64
