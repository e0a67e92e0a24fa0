"""An environment with vLLM, as suite `engine` is given one, with a stand-in where vLLM would be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

# An interpreter that finds the stand-in where one with vLLM finds vLLM.
PYTHON = """#!{python}
import runpy, sys
assert sys.argv[1] == "-I"
sys.path.insert(0, {folder!r})
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class StandIn:
    """python: to be given as --peer. notes: what the stand-in was given, in order."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.python, self._notes = folder / "python", folder / "notes"
        self._monkeypatch = monkeypatch
        here = str(Path(__file__).parent)
        self.python.write_text(PYTHON.format(python=sys.executable, folder=here))
        self.python.chmod(0o755)
        self.told()

    def told(self, *, fault: str | None = None, answers: list[list[int]] | None = None) -> None:
        said = {"fault": fault, "answers": answers, "notes": str(self._notes)}
        self._monkeypatch.setenv("STAND_IN", json.dumps(said))

    @property
    def notes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._notes.read_text().splitlines()]
