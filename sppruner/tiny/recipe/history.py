"""How the weights of a model folder came about, kept beside them as `training.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

__all__ = ["STAGES", "History"]

STAGES: Final = ("language", "vision", "sharpen", "joint")
_FILE: Final = "training.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Steps of every stage. again: joint steps added by later runs; note: what only these weights
    can say about themselves."""

    language: int
    vision: int
    sharpen: int
    joint: int
    again: int = 0
    note: str = ""

    @classmethod
    def read(cls, folder: Path) -> History:
        """Of a model folder. Raises FileNotFoundError where the recipe did not make it."""
        return cls(**json.loads((folder / _FILE).read_text()))

    def write(self, folder: Path) -> None:
        (folder / _FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def continued(self, steps: int) -> History:
        """After `steps` more joint steps."""
        return replace(self, again=self.again + steps)

    def __str__(self) -> str:
        """The sentences of the model card that depend on it."""
        again = (
            f" Then the joint training went on for {self.again:,} steps, without those losses."
            if self.again
            else ""
        )
        return again + (f"\n\n{self.note}" if self.note else "")
