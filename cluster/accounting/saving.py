"""The saving of a run: the ratio of its control blocks, applied to all its rows where these ran as
the blocks did.

Blocks are measured at a full replica. Rows that a replica waited for would have taken as long
densely; images that recur all over a corpus are in no block's caches; long blocks meet an online
request more often than short ones. Rows, footers and blocks say whether that was so: a saving that
they cast a doubt on is not stated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cluster.accounting.ledger import UnitLedger
from cluster.accounting.speedup import MeasuredRatio

# Rows outside blocks may take so many times as long as those of the steady parts: their replicas
# fill and empty too, when a run begins and ends and around each block.
_LONGER: Final = 1.3
# What they take beyond that matters from this share of the replica time on.
_EXCESS: Final = 0.1
# Share of the modelled FLOPs that caches spare: so much more or less of it in all rows.
_CACHED: Final = 0.1
# Of the blocks that were tried.
_SPOILED: Final = 0.2
# A kind of device with more of the replica time has a block.
_UNMEASURED: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """Replica time that a run's rows would have needed densely, less what they took."""

    seconds: float | None
    """Negative where pruning cost more; None where `doubts` say why that is not known."""
    low: float | None
    """Lower end of the interval; None without `seconds`, or without an interval of the ratio."""
    high: float | None
    """Upper end of the interval; None where `low` is."""
    doubts: tuple[str, ...] = ()
    """Why the blocks do not speak for the run's rows."""

    @property
    def shown(self) -> bool:
        """Whether it is one, or a loss, with certainty: the interval does not hold 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def saving_of(measured: MeasuredRatio, total: UnitLedger) -> Saving:
    """The saving of the rows that `total` is the ledger of, by the ratio of their blocks."""
    doubts = tuple(_doubts(total))
    if doubts:
        return Saving(seconds=None, low=None, high=None, doubts=doubts)
    seconds, low, high = (
        None if ratio is None else total.seconds * (ratio - 1)
        for ratio in (measured.ratio, measured.low, measured.high)
    )
    return Saving(seconds=seconds, low=low, high=high)


def _doubts(total: UnitLedger) -> Iterator[str]:
    taken, expected = _pace(total)
    if taken > _LONGER * expected and taken - expected > _EXCESS * total.nanoseconds:
        yield (
            f"rows outside the blocks took {taken / expected:.1f} times as long as those of full "
            "replicas: they were waited for, which pruning does not save, or are other rows"
        )
    shares = [
        _share(sum(total.flops_cached.values()), sum(total.flops.values())),
        _share(total.steady_flops_cached, total.steady_flops),
    ]
    if total.steady_flops and abs(shares[0] - shares[1]) > _CACHED:
        yield (
            f"caches spared {shares[0]:.0%} of the modelled FLOPs of all rows and {shares[1]:.0%} "
            "in the blocks, which begin with empty ones"
        )
    tried = len(total.blocks) + total.blocks_spoiled
    if total.blocks_spoiled > 1 and total.blocks_spoiled > _SPOILED * tried:
        yield (
            f"{total.blocks_spoiled} of {tried} control blocks were spoiled: those of rows that "
            "take long more often"
        )
    measured = {block.device for block in total.blocks}
    for device, spent in sorted(total.nanoseconds_by_device.items()):
        share = _share(spent, total.nanoseconds)
        if share > _UNMEASURED and device not in measured:
            yield f"no control block ran on {device}, which has {share:.0%} of the replica time"


def _pace(total: UnitLedger) -> tuple[float, float]:
    """Time of the rows outside the blocks, and what so many take on full replicas of their kinds,
    as the blocks say."""
    pruned, rows = defaultdict[str, int](int), defaultdict[str, int](int)
    for block in total.blocks:
        pruned[block.device] += block.pruned
        rows[block.device] += block.rows
    taken = expected = 0.0
    for device, count in sorted(total.ordinary_rows.items()):
        if pruned[device]:
            taken += total.ordinary_nanoseconds[device]
            expected += count * pruned[device] / rows[device]
    return taken, expected


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
