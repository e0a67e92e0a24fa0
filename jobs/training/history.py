"""Training history of a model folder, stored beside the weights as `training.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from sppruner.errors import UnsupportedModel

__all__ = ["STAGES", "History"]

STAGES: Final = ("language", "vision", "sharpen", "joint")
_FILE: Final = "training.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Steps of every stage; the fields are the keys of `training.json`."""

    language: int
    """Steps of the language stage."""
    vision: int
    """Steps of the vision stage."""
    sharpen: int
    """Steps of the second vision stage."""
    joint: int
    """Steps of the joint stage."""
    again: int = 0
    """Joint steps added by later runs."""
    note: str = ""
    """Text for the model card that holds for these weights only."""

    def __post_init__(self) -> None:
        for name in (*STAGES, "again"):
            steps = getattr(self, name)
            if type(steps) is not int or steps < 0:
                raise ValueError(f"{name} {steps!r} is not a number of steps")
        if not isinstance(self.note, str):
            raise ValueError(f"note {self.note!r} is not a text")

    @classmethod
    def read(cls, folder: Path) -> History:
        """The history of a model folder. Raises UnsupportedModel if the recipe did not write it."""
        file = folder / _FILE
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError as error:
            raise UnsupportedModel(
                f"{folder} holds no {_FILE}: give a folder that train_tiny wrote"
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise UnsupportedModel(
                f"{file} tells no history of training ({error}): restore what train_tiny wrote"
            ) from error

    def write(self, folder: Path) -> None:
        """Writes `training.json`."""
        (folder / _FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @property
    def joint_steps(self) -> int:
        """Joint steps of all runs."""
        return self.joint + self.again

    def continued(self, steps: int) -> History:
        """The history after `steps` more joint steps."""
        return replace(self, again=self.again + steps)

    def __str__(self) -> str:
        """The sentences of the model card that depend on the history."""
        again = (
            f" Then the joint training went on for {self.again:,} steps, without those losses."
            if self.again
            else ""
        )
        return again + (f"\n\n{self.note}" if self.note else "")
