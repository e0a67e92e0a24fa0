"""The boundary of a command's process: however a command ends, it is an exit code and, where it did
not end by itself, one line on stderr.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from cluster.errors import RunError, Unexpected
from cluster.logs import configure_logs
from cluster.termination import EXIT_TERMINATED, Terminated, raise_on_sigterm
from cluster.unexpected import as_run_error

_INTERRUPTED: Final = 130
"""A shell's status for a command that SIGINT ended."""
_UNREAD: Final = 1


def run_command(work: Callable[[], int], *, left: str = "") -> int:
    """The exit code of a command that does `work`, which returns it or raises.

    left: what stays of a command that was ended, and how to go on.
    """
    raise_on_sigterm()
    try:
        configure_logs()
        code = work()
        flush_stdout()
        return code
    except KeyboardInterrupt as interrupt:
        print(f"stopped{left and ': '}{left}", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(interrupt, Terminated) else _INTERRUPTED
    except BrokenPipeError:
        _leave_stdout()
        print("stdout was closed before everything was printed", file=sys.stderr)
        return _UNREAD
    except Exception as error:
        told = as_run_error(error)
        print(_line(told, left), file=sys.stderr)
        return told.exit_code


def _line(error: RunError, left: str) -> str:
    # The others say themselves how to go on.
    advice = f"; {left}" if left and isinstance(error, Unexpected) else ""
    return f"{error.code}: {error}{advice}"


def flush_stdout() -> None:
    """Writes what was printed. Raises OSError where that is not possible; Python, which tries again
    as it ends, then finds nothing to write."""
    try:
        sys.stdout.flush()
    except OSError:
        _leave_stdout()
        raise


def _leave_stdout() -> None:
    with suppress(io.UnsupportedOperation):  # of a test, which has no such file
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
