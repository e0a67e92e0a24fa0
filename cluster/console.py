"""Consoles for people: reports on stdout, progress on stderr."""

from __future__ import annotations

import sys

from rich.console import Console

_PIPE_WIDTH = 140


def open_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr, as wide as the terminal, and wide where there is none: logs
    and pipes have no width to fit."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else _PIPE_WIDTH)
