"""The break-even decision: whether pruning pays, given what was measured.

Pruning a short prompt, or a model whose time goes elsewhere, can cost more than it saves. Runs
(`RunConfig.auto`) and endpoints (`auto=true`) that decide by measurement use the same rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.accounting.speedup import CONFIDENCE, MeasuredRatio, measured_ratio, nanoseconds
from sppruner.engine.interface import Result
from sppruner.spec import DENSE, PruneSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """One decision."""

    measured: MeasuredRatio | None
    """The ratio of control rows; None where there were too few rows to measure."""

    @classmethod
    def from_results(cls, results: Iterable[Result], *, decisions: int = 1) -> BreakEven:
        """The decision from results of control requests; those without a dense twin (errors) do
        not count. decisions: that are made together: all of their intervals hold at once with 95 %
        (Bonferroni), so that of many sizes and loads none is called faster by chance."""
        pairs = [
            (nanoseconds(result.seconds), nanoseconds(result.control_seconds))
            for result in results
            if result.control_seconds is not None
        ]
        confidence = 1 - (1 - CONFIDENCE) / decisions
        return cls(measured=measured_ratio(pairs, confidence=confidence))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BreakEven:
        """The inverse of `to_dict`. Raises KeyError or TypeError on anything else."""
        measured = data["measured"]
        return cls(measured=None if measured is None else MeasuredRatio(**measured))

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
        return {"pays": self.pays, "measured": measured}
