"""structlog, set up once per process: entry points call `configure_logs`, Ray workers run it as
their `worker_process_setup_hook`. Ids are bound as fields, never formatted into messages.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Literal, TypeAlias, get_args

import structlog
from structlog.typing import Processor

from cluster.errors import UsageError

LogFormat: TypeAlias = Literal["console", "keyvalue", "json"]
LOG_FORMAT_VARIABLE = "SPPRUNER_LOG_FORMAT"
LOG_LEVEL_VARIABLE = "SPPRUNER_LOG_LEVEL"

WORKER_HOOK = {"worker_process_setup_hook": "cluster.logs.configure_logs"}
"""For `ray.init(runtime_env=…)`: a name, so that workers import the hook, not unpickle it."""

# Loggers that write hundreds of INFO lines per run about themselves.
_VERBOSE_LOGGERS = (
    "ray",
    "ray.data",
    "ray.serve",
    "botocore",
    "boto3",
    "urllib3",
    "httpx",
    "httpcore",
    "transformers",
    "PIL",
)


def log_format() -> LogFormat:
    """SPPRUNER_LOG_FORMAT if set; else console on a terminal, key=value lines elsewhere."""
    chosen = os.environ.get(LOG_FORMAT_VARIABLE)
    if chosen is None:
        return "console" if sys.stderr.isatty() else "keyvalue"
    for known in get_args(LogFormat):
        if chosen == known:
            return chosen  # type: ignore[return-value]
    formats = ", ".join(get_args(LogFormat))
    raise UsageError(f"{LOG_FORMAT_VARIABLE}={chosen!r}: use one of {formats}")


def log_level() -> int:
    """SPPRUNER_LOG_LEVEL if set (debug logs every unit read and labelled); else info."""
    chosen = os.environ.get(LOG_LEVEL_VARIABLE, "info")
    levels = logging.getLevelNamesMapping()
    if chosen.upper() not in levels:
        raise UsageError(f"{LOG_LEVEL_VARIABLE}={chosen!r}: use debug, info, warning or error")
    return levels[chosen.upper()]


def configure_logs() -> None:
    """Sends logs to stderr; stdout stays free for a command's own output."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *_renderers(log_format()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(log_level()),
        # Written, not printed: Serve replaces print() in its processes.
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    for name in _VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    # Serve resets its logger's level when it is imported, which in workers happens after this.
    logging.getLogger("ray.serve").addFilter(_is_warning)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _renderers(chosen: LogFormat) -> list[Processor]:
    if chosen == "console":
        return [structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ)]
    if chosen == "json":
        return [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
    ]
