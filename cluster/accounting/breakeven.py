"""Where pruning does not pay, and what a run that may choose (`RunConfig.auto`) chose.

Pruning a short prompt, or for a model whose time goes elsewhere, can cost more than it saves. The
choice is made once (`cluster.runs.calibration`) and kept beside the output: a resumed run holds to
it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from cluster.accounting.ledger import MeasuredRatio
from cluster.store import Store
from sppruner.spec import DENSE, PruneSpec

_KEY: Final = "_run/break-even.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """One choice. measured: of rows of the run, both ways; None where there were too few."""

    measured: MeasuredRatio | None

    @property
    def pays(self) -> bool:
        """Pruning was faster on all but 2.5 % of the resampled batches: it costs quality, so it
        has to be sure."""
        return self.measured is not None and (self.measured.low or 0.0) > 1.0

    def spec(self, asked: PruneSpec) -> PruneSpec:
        """What the run's rows are labelled with."""
        return asked if self.pays else DENSE

    def to_dict(self) -> dict[str, Any]:
        measured = None if self.measured is None else asdict(self.measured)
        return {"pays": self.pays, "measured": measured}


def read_break_even(store: Store) -> BreakEven | None:
    """The choice of the run of this output; None where it was not its to make, or not made yet."""
    if store.head(_KEY) is None:
        return None
    measured: dict[str, Any] | None = json.loads(store.get(_KEY))["measured"]
    return BreakEven(measured=None if measured is None else MeasuredRatio(**measured))


def keep_break_even(store: Store, chosen: BreakEven, *, writer: str) -> BreakEven:
    """The choice that holds from now on: this one, or another driver's that was there first."""
    if store.put_if_absent(_KEY, json.dumps(chosen.to_dict()).encode(), writer=writer):
        return chosen
    kept = read_break_even(store)
    assert kept is not None
    return kept
