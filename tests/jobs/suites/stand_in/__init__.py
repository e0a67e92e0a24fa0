"""A Python environment for `--peer` in which a stand-in takes the place of vLLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

# An interpreter whose `import vllm` finds the stand-in.
PYTHON = """#!{python}
import runpy, sys
assert sys.argv[1] == "-I"
sys.path.insert(0, {folder!r})
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class StandIn:
    """python: value for --peer. notes: what the stand-in received, in order."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.python, self._notes = folder / "python", folder / "notes"
        self._monkeypatch = monkeypatch
        here = str(Path(__file__).parent)
        self.python.write_text(PYTHON.format(python=sys.executable, folder=here))
        self.python.chmod(0o755)
        self.configure()

    def configure(
        self, *, fault: str | None = None, answers: list[list[int]] | None = None
    ) -> None:
        settings = {"fault": fault, "answers": answers, "notes": str(self._notes)}
        self._monkeypatch.setenv("STAND_IN", json.dumps(settings))

    @property
    def notes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._notes.read_text().splitlines()]
