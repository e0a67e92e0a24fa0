"""How much is measured: which units may hold a control block, and when there are enough of them.

Measuring costs a dense answer for each row of a block. It is worth a stated precision and no more:
the first blocks, of units drawn by hash from the whole corpus, say how many more it takes (Stein's
two-stage procedure, 1945), and these are spread over the run. What all of them cost stays below a
stated share of the run's seconds; a corpus too small for that is not measured unless asked to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import ceil
from typing import Final

from cluster.accounting.ledger import UnitLedger
from cluster.accounting.speedup import FEWEST_BLOCKS, NANO, measured_ratio
from cluster.accounting.steady_part import BLOCK_SLOTS

HALF_WIDTH: Final = 0.1
"""Precision that a run measures to: half of the interval of the ratio's logarithm."""
COST_SHARE: Final = 0.05
"""Most that measuring may cost, of the seconds of the run's rows."""
# So many are measured even where the first are precise: also of what the run meets later.
_FEWEST: Final = 10
_MOST: Final = 64
# Before anything is measured a dense row is taken for so many pruned ones.
_ASSUMED_RATIO: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlan:
    """The control blocks that a run may have."""

    ranks: Mapping[str, int]
    """Units that may hold a block, in order of their hashes: the first ones are measured first."""
    block_rows: int
    """Rows of a block: four times the slots of a replica, so that half of them run steadily."""
    rows: int
    """Planned rows of the run."""
    asked: int | None
    """Blocks to measure whatever they cost; None for the stated precision within the stated
    cost."""
    seed: str
    """The run's id."""
    reason: str | None = None
    """Why nothing is measured, and what measures anyway; None where something is."""

    @classmethod
    def of(
        cls, run_id: str, units: Iterable[tuple[str, int]], *, slots: int, asked: int | None = None
    ) -> ControlPlan:
        """The plan of a run with these units (id, rows). slots: rows that a replica runs at once.
        asked: blocks, 0 for none; None for as many as the stated precision takes."""
        units = list(units)
        rows, block_rows = sum(count for _, count in units), BLOCK_SLOTS * slots
        large = [unit for unit, count in units if count >= block_rows]
        reason = None
        if asked is None:
            few = FEWEST_BLOCKS * block_rows
            if few * _ASSUMED_RATIO > COST_SHARE * rows:
                reason = (
                    f"{rows:,} rows are too few: {FEWEST_BLOCKS} blocks of {block_rows} rows, "
                    f"answered densely too, may take more than {COST_SHARE:.0%} of the run's "
                    f"seconds; --control-blocks {FEWEST_BLOCKS} measures anyway"
                )
            elif len(large) < FEWEST_BLOCKS:
                reason = (
                    f"{len(large)} units have the {block_rows} rows of a control block; "
                    f"--control-blocks {FEWEST_BLOCKS} measures on smaller ones"
                )
            candidates, most = large, 2 * _MOST
        else:
            reason = None if asked else "no control blocks were asked for"
            # Smaller units, whose batches are less full, only where there are no others.
            whole = [unit for unit, _ in sorted(units, key=lambda unit: -unit[1])]
            candidates = large if len(large) >= asked else whole[: 2 * asked]
            most = 2 * asked  # some may be spoiled
        drawn = nsmallest(most, candidates, key=lambda unit: _hash(run_id, unit))
        return cls(
            ranks={} if reason else {unit: rank for rank, unit in enumerate(drawn)},
            block_rows=block_rows,
            rows=rows,
            asked=asked,
            seed=run_id,
            reason=reason,
        )

    @property
    def first(self) -> Sequence[str]:
        """Units to be labelled before all others: they say how many more are measured."""
        return list(self.ranks)[:FEWEST_BLOCKS] if self.asked is None else []

    def draw(self, unit: str, rows: Sequence[int]) -> Sequence[int]:
        """The rows of the unit's block, one after the other; empty where there are too few. rows:
        numbers of those that can be answered."""
        size = self.block_rows if self.asked is None else min(self.block_rows, len(rows))
        if unit not in self.ranks or not 0 < size <= len(rows):
            return []
        start = int(_hash(self.seed, "start", unit) * (len(rows) - size + 1))
        return rows[start : start + size]

    def dense_first(self, unit: str) -> bool:
        """Which way the unit's block is answered first: half of all blocks each, so that neither
        always meets the warmer machine."""
        return self.ranks[unit] % 2 == 1

    def allows(
        self,
        unit: str,
        ledger: UnitLedger,
        granted: Collection[str] = (),
        passed: Collection[str] = (),
    ) -> bool:
        """Whether the unit's block is to be measured.

        ledger: of the committed units. granted: units whose blocks were allowed and are not
        committed yet. passed: units that were committed without a measured block, because it was
        spoiled, had too few rows, or was not wanted by then.
        """
        rank = self.ranks.get(unit)
        if rank is None:
            return False
        wanted = self._wanted(ledger) if self.asked is None else self.asked
        if rank >= self._limit(wanted, passed):
            return False
        if self.asked is not None:
            return True
        answered = ledger.rows - ledger.rows_failed
        of_row = ledger.nanoseconds / answered if answered else 1.0
        of_block = _ASSUMED_RATIO * of_row * self.block_rows
        if ledger.blocks:
            of_block = ledger.control_nanoseconds / len(ledger.blocks)
        spent = ledger.control_nanoseconds + (len(granted) + 1) * of_block
        return spent <= COST_SHARE * of_row * self.rows

    def _limit(self, wanted: int, passed: Collection[str]) -> int:
        """The rank below which so many blocks can still be measured, those in `passed` left out."""
        lost = {self.ranks[unit] for unit in passed if unit in self.ranks}
        limit = wanted
        while (higher := wanted + sum(rank < limit for rank in lost)) > limit:
            limit = higher
        return limit

    def _wanted(self, ledger: UnitLedger) -> int:
        if len(ledger.blocks) < FEWEST_BLOCKS:
            return FEWEST_BLOCKS
        seconds = {kind: spent / NANO for kind, spent in ledger.nanoseconds_by_device.items()}
        found = measured_ratio(ledger.blocks, seconds=seconds)
        if found is None or found.half_width is None:
            return _MOST
        # The half-width falls with the root of the number of blocks.
        enough = ceil(found.blocks * (found.half_width / HALF_WIDTH) ** 2)
        return min(max(enough, _FEWEST), _MOST)


def _hash(*what: str) -> float:
    """A number in [0, 1) that depends on `what` alone."""
    digest = hashlib.sha256("\0".join(what).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
