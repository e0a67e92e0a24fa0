"""How much is measured: which units may hold a control block, and when there are enough of them.

Measuring costs a dense answer for each row of a block. It is worth a stated precision and no more:
the first blocks, of units drawn by hash from the whole corpus, say how many more it takes (Stein's
two-stage procedure, 1945), and these are spread over the run. Later blocks have no say: a run that
measured on wherever blocks differ would measure some parts of its corpus more densely than others.
What all of them cost is planned to stay below a stated share of the run's seconds; a corpus too
small for that is not measured unless asked to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import ceil
from typing import Final

from cluster.accounting.ledger import UnitLedger
from cluster.accounting.speedup import FEWEST_BLOCKS, Block, measured_ratio
from cluster.accounting.steady_part import BLOCK_SLOTS

HALF_WIDTH: Final = 0.1
"""Precision that a run measures to: half of the interval of the ratio's logarithm."""
COST_SHARE: Final = 0.05
"""Most that measuring may cost, of the seconds of the run's rows."""
# So many are measured even where the first are precise: also of what the run meets later.
_FEWEST: Final = 10
_MOST: Final = 56
# Before anything is measured a dense row is taken for so many pruned ones.
_ASSUMED_RATIO: Final = 3.0
# Rows of the smallest block that is measured unasked, for each slot: its arms count whole, which
# draws its ratio towards 1, but every slot has answered.
_FEWEST_SLOTS: Final = 2
# Units drawn for each block that was asked for: others may be spoiled, or labelled already.
_SPARE: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlan:
    """The control blocks that a run may have."""

    ranks: Mapping[str, int]
    """Units that may hold a block, in order of their hashes: the first ones are measured first."""
    block_rows: int
    """Rows of a block: four times the slots of a replica, so that half of them run steadily. A
    smaller unit is a block as a whole."""
    fewest_rows: int
    """Rows that a block has at least."""
    rows: int
    """Planned rows of the run."""
    asked: int | None
    """Blocks to measure whatever they cost; None for the stated precision within the stated
    cost."""
    seed: str
    """The run's id."""
    reason: str | None = None
    """Why nothing, or less than was asked for, is measured; None elsewhere."""

    @classmethod
    def of(
        cls, run_id: str, units: Iterable[tuple[str, int]], *, slots: int, asked: int | None = None
    ) -> ControlPlan:
        """The plan of a run with these units (id, rows). slots: rows that a replica runs at once.
        asked: blocks, 0 for none; None for as many as the stated precision takes."""
        units = list(units)
        rows, block_rows = sum(count for _, count in units), BLOCK_SLOTS * slots
        fewest = _FEWEST_SLOTS * slots
        candidates = [unit for unit, count in units if count >= fewest]
        reason = None
        if asked is None:
            few = FEWEST_BLOCKS * block_rows
            if few * _ASSUMED_RATIO > COST_SHARE * rows:
                reason = (
                    f"{rows:,} rows are too few: {FEWEST_BLOCKS} blocks of {block_rows} rows, "
                    f"answered densely too, may take more than {COST_SHARE:.0%} of the run's "
                    f"seconds; {_advice(len(units))}"
                )
            elif len(candidates) < FEWEST_BLOCKS:
                reason = (
                    f"{len(candidates)} of {len(units)} units have the {fewest} rows of a control "
                    f"block, twice what a replica answers at once; {_advice(len(units))}"
                )
            most = 0 if reason else 2 * _MOST
        else:
            # Smaller units, whose batches are less full, only where there are too few others.
            if len(candidates) < asked:
                by_size = sorted(units, key=lambda unit: -unit[1])
                candidates, fewest = [unit for unit, _ in by_size[: _SPARE * asked]], 1
            most = _SPARE * asked
            if not asked:
                reason = "no control blocks were asked for"
            elif len(candidates) < asked:
                reason = (
                    f"{asked} control blocks were asked for: each of {len(units)} units has one"
                )
        drawn = nsmallest(most, candidates, key=lambda unit: _hash(run_id, unit))
        return cls(
            ranks={unit: rank for rank, unit in enumerate(drawn)},
            block_rows=block_rows,
            fewest_rows=fewest,
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
        size = min(self.block_rows, len(rows))
        if unit not in self.ranks or size < self.fewest_rows:
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
        lost: Collection[str] = (),
        measured: Mapping[str, Block] | None = None,
    ) -> bool:
        """Whether the unit's block is to be measured.

        ledger: of the committed units. granted: units whose blocks were allowed and are not
        committed yet. lost: committed units that `loses` named. measured: blocks of committed
        units.
        """
        rank = self.ranks.get(unit)
        if rank is None:
            return False
        if self.asked is not None:
            return rank < self._limit(self.asked, lost)
        if rank < FEWEST_BLOCKS:
            return True  # what these cost was known when the run began
        if rank >= self._limit(self._wanted(measured or {}), lost):
            return False
        answered = ledger.rows - ledger.rows_failed
        of_row = ledger.nanoseconds / answered if answered else 1.0
        of_block = _ASSUMED_RATIO * of_row * self.block_rows
        if ledger.blocks:
            of_block = ledger.control_nanoseconds / len(ledger.blocks)
        spent = ledger.control_nanoseconds + (len(granted) + 1) * of_block
        return spent <= COST_SHARE * of_row * self.rows

    def loses(self, unit: str, ledger: UnitLedger) -> bool:
        """Whether a unit was committed with this ledger, without a block that was wanted: another
        unit takes its place. One of those that are measured first, or of blocks that were asked
        for, was wanted whatever became of it: it may have been committed before."""
        if ledger.blocks:
            return False
        answered = ledger.rows - ledger.rows_failed
        spoiled = ledger.blocks_spoiled > 0 or answered < self.fewest_rows
        first = self.ranks.get(unit, FEWEST_BLOCKS) < FEWEST_BLOCKS
        return spoiled or first or self.asked is not None

    def _limit(self, wanted: int, lost: Collection[str]) -> int:
        """The rank below which so many blocks can still be measured, those in `lost` left out."""
        ranks = {self.ranks[unit] for unit in lost if unit in self.ranks}
        limit = wanted
        while (higher := wanted + sum(rank < limit for rank in ranks)) > limit:
            limit = higher
        return limit

    def _wanted(self, measured: Mapping[str, Block]) -> int:
        """As the first blocks say, in the order of the ranks: the same in every attempt."""
        first = sorted(measured.keys() & self.ranks.keys(), key=self.ranks.__getitem__)
        if len(first) < FEWEST_BLOCKS:
            return FEWEST_BLOCKS
        found = measured_ratio([measured[unit] for unit in first[:FEWEST_BLOCKS]])
        if found is None or found.half_width is None:
            return _MOST
        # The half-width falls with the root of the number of blocks.
        enough = ceil(found.blocks * (found.half_width / HALF_WIDTH) ** 2)
        return min(max(enough, _FEWEST), _MOST)


def _advice(units: int) -> str:
    blocks = min(units, FEWEST_BLOCKS)
    without = "" if units >= FEWEST_BLOCKS else ", without an interval"
    return f"a run with --control-blocks {blocks} measures anyway{without}"


def _hash(*what: str) -> float:
    """A number in [0, 1) that depends on `what` alone."""
    digest = hashlib.sha256("\0".join(what).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
