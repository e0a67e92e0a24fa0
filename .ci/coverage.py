"""What the measured tests of `make test` must reach, from the `.coverage` file they leave.

Modules that are pure functions of their arguments: every line and branch. All that is measured:
`fail_under` of pyproject.toml, which must be raised when it is more than `SLACK` points too low.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

PURE = (
    "sppruner/spec.py",
    "sppruner/vqa.py",
    "sppruner/selectors/*",
    "cluster/accounting/*",
    "cluster/output/*",
    "cluster/runs/planning.py",
)
SLACK = 2

ROOT = Path(__file__).resolve().parents[1]


def report(*options: str, capture: bool = False) -> tuple[int, str]:
    """Exit status and, if captured, the output of `coverage report`."""
    command = [sys.executable, "-m", "coverage", "report", *options]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None)
    return done.returncode, done.stdout or ""


def main() -> int:
    everything, _ = report("--skip-covered")
    # Last, and only what is missing: a log is read from its end.
    only = ("--skip-covered", "--show-missing", "--include", ",".join(PURE))
    pure, _ = report("--fail-under=100", *only)
    if pure:
        print("a line or branch of a pure module was not run: a test must do so, each time")
    if pure or everything:
        return 1
    _, total = report("--format=total", capture=True)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    floor = settings["tool"]["coverage"]["report"]["fail_under"]
    if int(total) - floor > SLACK:
        print(f"coverage is {total.strip()}: raise fail_under of pyproject.toml from {floor} to it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
