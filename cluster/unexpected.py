"""Whatever ended a run, as a RunError: one line for people, whoever raised it and wherever."""

from __future__ import annotations

import re
import sys
from pathlib import PurePath
from traceback import format_exception, format_tb
from typing import Any, Final

import structlog

from cluster.errors import RunError, Unexpected

logger = structlog.get_logger(__name__)

_CHARACTERS: Final = 400
_FRAMES: Final = 12


def run_error(error: BaseException | None) -> RunError | None:
    """The RunError inside what Ray wrapped around it; None if there is none."""
    while error is not None:
        # Ray raises an error that is of its own class and of the cause's, and prints its stack.
        if isinstance(error, RunError) and not _is_of_a_task(error):
            return error
        error = _cause(error) or error.__cause__
    return None


def as_run_error(error: Exception) -> RunError:
    """The RunError inside an error, or else an Unexpected, which says what the error was and where
    it came from. The lines of code that it passed are logged then, at debug level its traceback."""
    found = run_error(error)
    if found is not None:
        return found
    told, place = _innermost(error)
    text = " ".join(f"{type(told).__name__}: {told}".split())
    if len(text) > _CHARACTERS:
        text = f"{text[:_CHARACTERS]} …"
    # As one line each: a log of lines stays one, and nothing looks like a crash that is none.
    logger.error("unexpected_error", error=text, lines=_lines(error))
    logger.debug("unexpected_error", traceback="".join(format_exception(error)))
    return Unexpected(
        f"{text}{place}; unexpected_error in the log names the lines of code, and with "
        "SPPRUNER_LOG_LEVEL=debug has the traceback"
    )


def _innermost(error: BaseException) -> tuple[BaseException, str]:
    """What a task of Ray raised, and where it ran, for people; the error itself elsewhere."""
    place = ""
    while _is_of_a_task(error):
        # Its text alone has that in every form of the error.
        ran = re.search(r"\(pid=(\d+), ip=([^,)\s]+)", str(error))
        place = f", in a task of Ray on {ran[2]}, process {ran[1]}" if ran else ", in a task of Ray"
        cause = _cause(error)
        if cause is None:
            break
        error = cause
    return error, place


def _cause(error: BaseException) -> BaseException | None:
    """What Ray made the error of."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else None


def _is_of_a_task(error: BaseException) -> bool:
    """Whether Ray made it of what a task raised. Without Ray, which takes seconds to import, there
    is none."""
    ray_errors: Any = sys.modules.get("ray.exceptions")
    return ray_errors is not None and isinstance(error, ray_errors.RayTaskError)


def _lines(error: BaseException) -> str:
    """The lines of code that the error passed; of a task of Ray's, those in the task."""
    passed = str(error) if _is_of_a_task(error) else "".join(format_tb(error.__traceback__))
    found = re.findall(r'File "([^"]+)", line (\d+)', passed)
    return " ".join(f"{PurePath(file).name}:{line}" for file, line in found[-_FRAMES:])
