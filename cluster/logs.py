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

# For `ray.init(runtime_env=...)`: a name, so that workers import it instead of unpickling it.
WORKER_HOOK = {"worker_process_setup_hook": "cluster.logs.configure_logs"}

# What these say at INFO is about themselves, hundreds of lines per run.
_CHATTERERS = (
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
    """SPPRUNER_LOG_LEVEL if set (debug tells of every unit read and labelled); else info."""
    chosen = os.environ.get(LOG_LEVEL_VARIABLE, "info")
    levels = logging.getLevelNamesMapping()
    if chosen.upper() not in levels:
        raise UsageError(f"{LOG_LEVEL_VARIABLE}={chosen!r}: use debug, info, warning or error")
    return levels[chosen.upper()]


def configure_logs() -> None:
    """Logs go to stderr; stdout stays free for what a command was asked to print."""
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
    for name in _CHATTERERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    # Serve sets its logger's level anew when it is imported, which in workers is after this.
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
