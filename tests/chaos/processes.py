"""Ray's processes on this machine as the kernel shows them: no connection to Ray is needed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Final

TITLES: Final = {
    "replica": r"ray::ServeReplica:[^:]*:vlm-",
    "labeller": r"ray::.*Labeller",
    "reader": r"ray::.*Units",
    "writer": r"ray::(Write|.*Commit)",
    "controller": r"ray::RunController",
    "janitor": r"ray::(Patrolling)?Janitor",
    "serve_controller": r"ray::ServeController",
}
"""What the processes of each role call themselves."""


def find_workers(role: str, raylets: Collection[int]) -> list[int]:
    """Ids of the running processes of a role, among the children of these raylets."""
    found = []
    for pid, parent, title in _processes():
        if parent in raylets and re.match(TITLES[role], title):
            found.append(pid)
    return sorted(found)


def titles(raylets: Collection[int]) -> dict[int, str]:
    """All workers of these raylets by process id, for logs."""
    return {pid: title for pid, parent, title in _processes() if parent in raylets}


def children(pid: int) -> list[str]:
    """The command lines of the running children of a process."""
    return [title for _, parent, title in _processes() if parent == pid]


def raylets_of(pid: int) -> list[int]:
    """The raylets that a driver has started."""
    return [child for child, parent, title in _processes() if parent == pid and "raylet" in title]


def send(pid: int, number: signal.Signals) -> bool:
    """Sends a signal; False where the process has gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _processes() -> list[tuple[int, int, str]]:
    """(pid, parent, command line) of every process that still runs."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            # The second field is a name in brackets, which may hold anything.
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in ("Z", "X"):
            found.append((int(folder.name), int(parent), title.strip()))
    return found
