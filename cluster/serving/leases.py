"""Who uses which fleet: a table of leases, without Ray, Serve or a clock of its own.

A job holds the fleet that it deployed or found, and beats while it lives. A fleet may be removed
once nobody holds it; nobody gets a fleet that is being removed. Times are seconds of any clock that
only goes forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class _Fleet:
    beats: dict[str, float] = field(default_factory=dict)
    """When each holder was last heard of."""
    last_held: float
    """When a holder was last heard of, or the fleet first seen."""
    removing: bool = False


class Leases:
    """The table. A holder that is not heard of for `patience_seconds` is taken for dead; one that
    only slept comes back with its next beat."""

    def __init__(self, *, patience_seconds: float) -> None:
        self._patience = patience_seconds
        self._fleets: dict[str, _Fleet] = {}
        self._deployer: str | None = None

    def hold(self, fleet: str, holder: str, now: float) -> bool:
        """Takes or renews a lease. False while the fleet is being removed: ask again."""
        entry = self._fleets.setdefault(fleet, _Fleet(last_held=now))
        if entry.removing:
            return False
        entry.beats[holder] = entry.last_held = now
        return True

    def claim_deployment(self, holder: str, now: float) -> bool:
        """Whether this holder, and nobody else, may deploy until it says that it has: of two jobs
        that deploy at once the second would replace the replicas of the first, or its Serve."""
        self._forget_dead(now)
        if self._deployer is None and any(holder in f.beats for f in self._fleets.values()):
            self._deployer = holder
        return self._deployer == holder

    def deployed(self, holder: str) -> None:
        """The holder has deployed, or failed to."""
        if self._deployer == holder:
            self._deployer = None

    def release(self, fleet: str, holder: str, now: float) -> bool:
        """Ends a lease. True if that was the last one: the fleet is then being removed, until
        `removed` is called."""
        self._forget_dead(now)
        entry = self._fleets.get(fleet)
        if entry is None or entry.removing or entry.beats.pop(holder, None) is None:
            return False
        self.deployed(holder)
        entry.removing = not entry.beats
        return entry.removing

    def overdue(self, fleets: Iterable[str], now: float) -> list[str]:
        """Those of the existing `fleets` that nobody has held for the patience. They are then
        being removed, until `removed` is called. One that is new to this table, which may be
        younger than the fleet, is given as much time for its holders to be heard of."""
        self._forget_dead(now)
        fleets = set(fleets)
        for fleet, entry in list(self._fleets.items()):
            if fleet not in fleets and not entry.beats and not entry.removing:
                del self._fleets[fleet]  # never deployed, or removed by somebody else
        found = []
        for fleet in sorted(fleets):
            entry = self._fleets.setdefault(fleet, _Fleet(last_held=now))
            idle = now - entry.last_held >= self._patience
            if idle and not entry.beats and not entry.removing:
                entry.removing = True
                found.append(fleet)
        return found

    def removed(self, fleet: str) -> None:
        """The removal has ended, well or badly: a fleet that still exists becomes overdue anew."""
        self._fleets.pop(fleet, None)

    def holders(self, fleet: str) -> list[str]:
        """Who holds the fleet."""
        entry = self._fleets.get(fleet)
        return [] if entry is None else sorted(entry.beats)

    def _forget_dead(self, now: float) -> None:
        for entry in self._fleets.values():
            for holder in [h for h, beat in entry.beats.items() if now - beat >= self._patience]:
                del entry.beats[holder]
                self.deployed(holder)
