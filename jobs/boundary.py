"""The boundary of a command's process: however a command ends, it is an exit code and, where it did
not end by itself, one line on stderr.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NoReturn

from cluster.encoding import check_process
from cluster.errors import Unexpected
from cluster.logs import configure_logs
from cluster.termination import (
    EXIT_TERMINATED,
    end_on_sigterm,
    raise_on_sigterm,
    was_terminated,
)
from cluster.unexpected import as_run_error

_INTERRUPTED: Final = 130
"""A shell's status for a command that SIGINT ended."""
_UNREAD: Final = 1


def end_with(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code of a command's main, once it has called what was
    registered for its end. Python's own end is left out: it takes down torch object by object, for
    seconds in which the system's default would answer SIGTERM."""
    codes: list[int] = []

    def leave() -> None:  # registered first, and so called last
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        for code in codes:
            os._exit(code % 256)

    atexit.register(leave)
    codes.append(main())
    sys.exit(codes[0])


def run_command(
    work: Callable[[], int], arguments: Sequence[str] | None = None, *, left: str = ""
) -> int:
    """The exit code of a command that does `work`, which returns it or raises.

    arguments: of the command, None for those of the process; where one is not UTF-8, it is a usage
    error. left: what stays of a command that was ended, and how to go on.
    """
    stopped = f"stopped: {left}" if left else "stopped"
    try:
        raise_on_sigterm()
        try:
            code, line = _carry_out(work, arguments, left)
        except KeyboardInterrupt:
            code, line = _INTERRUPTED, stopped
        end_on_sigterm(stopped)
    except KeyboardInterrupt:  # just behind the end
        code, line = _INTERRUPTED, stopped
    if was_terminated():
        code, line = EXIT_TERMINATED, stopped
    if line is not None:
        print(line, file=sys.stderr)
    return code


def _carry_out(
    work: Callable[[], int], arguments: Sequence[str] | None, left: str
) -> tuple[int, str | None]:
    """The exit code, and the line that says why it is not the command's own."""
    try:
        check_process(arguments)
        configure_logs()
        code = work()
        flush_stdout()
        return code, None
    except BrokenPipeError:
        _leave_stdout()
        return _UNREAD, "stdout was closed before everything was printed"
    except SystemExit as ended:  # of a process that the command started
        return ended.code if isinstance(ended.code, int) else 1, None
    except Exception as error:
        told = as_run_error(error)
        # The others say themselves how to go on.
        advice = f"; {left}" if left and isinstance(told, Unexpected) else ""
        return told.exit_code, f"{told.code}: {told}{advice}"


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
