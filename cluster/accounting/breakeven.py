"""The break-even decision: whether pruning pays, given what was measured.

Pruning a short prompt, or a model whose time goes elsewhere, can cost more than it saves. Runs
(`RunConfig.auto`) and endpoints (`auto=true`) that decide by measurement use the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.accounting.speedup import CONFIDENCE, Block, MeasuredRatio, measured_ratio
from sppruner.spec import DENSE, PruneSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """One decision."""

    measured: MeasuredRatio | None
    """The ratio of control blocks; None where there were too few rows to measure."""
    evidence: tuple[Block, ...] = ()
    """The blocks that it rests on; empty of a decision of an earlier version."""
    seconds: float = 0.0
    """Replica time that measuring took, before the run began."""

    @classmethod
    def from_blocks(
        cls, blocks: Sequence[Block], *, decisions: int = 1, seconds: float = 0.0
    ) -> BreakEven:
        """The decision from control blocks. decisions: that are made together: all of their
        intervals hold at once with 95 % (Bonferroni), so that of many sizes and loads none is
        called faster by chance. seconds: of replica time that measuring took."""
        confidence = 1 - (1 - CONFIDENCE) / decisions
        return cls(
            measured=measured_ratio(blocks, confidence=confidence),
            evidence=tuple(blocks),
            seconds=seconds,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BreakEven:
        """The inverse of `to_dict`. Raises KeyError or TypeError on anything else."""
        measured = data["measured"]
        if measured is not None and "batches" in measured:  # of schema version 2
            measured = {**measured, "blocks": measured["batches"]}
            del measured["batches"]
        return cls(
            measured=None if measured is None else MeasuredRatio(**measured),
            evidence=tuple(Block(*block) for block in data.get("evidence", ())),
            seconds=float(data.get("seconds", 0.0)),
        )

    @property
    def pays(self) -> bool:
        """Whether the whole interval is above 1. Pruning costs quality, so it needs certainty."""
        return self.measured is not None and (self.measured.low or 0.0) > 1.0

    def spec(self, requested: PruneSpec) -> PruneSpec:
        """What rows are labelled with: the requested spec where it pays, dense elsewhere."""
        return requested if self.pays else DENSE

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        measured = None if self.measured is None else asdict(self.measured)
        return {
            "pays": self.pays,
            "measured": measured,
            "evidence": [list(block) for block in self.evidence],
            "seconds": self.seconds,
        }
