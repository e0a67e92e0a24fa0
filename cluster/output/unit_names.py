"""How the objects of a run's units are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cluster.output.manifest import Manifest

SUFFIX: Final = ".parquet"
"""How the names of units end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitNames:
    """The names of one run."""

    run_id: str
    """The run."""
    layout: int = 2
    """See `Manifest.layout`."""

    @classmethod
    def of(cls, manifest: Manifest) -> UnitNames:
        """The names that a run's manifest prescribes."""
        return cls(run_id=manifest.run_id, layout=manifest.layout)

    @property
    def prefix(self) -> str:
        """What stands before the unit id."""
        return "" if self.layout == 1 else f"{self.run_id}-"

    def key(self, unit_id: str) -> str:
        """The key of a unit."""
        return f"{self.prefix}{unit_id}{SUFFIX}"

    def unit_id(self, key: str) -> str | None:
        """The unit that is called `key`; None for what no unit of the run is called. Objects in
        folders are none of ours."""
        if "/" in key or not (key.startswith(self.prefix) and key.endswith(SUFFIX)):
            return None
        return key.removeprefix(self.prefix).removesuffix(SUFFIX)
