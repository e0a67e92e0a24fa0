"""Logs: format, level and destination of events, and the hook of Ray's workers."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from cluster.errors import UsageError
from cluster.logs import (
    LOG_FORMAT_VARIABLE,
    LOG_LEVEL_VARIABLE,
    WORKER_HOOK,
    configure_logs,
    log_format,
    log_level,
)


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(LOG_FORMAT_VARIABLE, raising=False)
    before = structlog.get_config()
    levels = {name: logging.getLogger(name).level for name in ("ray", "ray.serve", "botocore")}
    yield
    structlog.configure(**before)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def logged(capsys: pytest.CaptureFixture[str]) -> str:
    """One event as written to stderr. Nothing is written to stdout."""
    configure_logs()
    structlog.get_logger("x").info("unit_labelled", unit_id="u 1", rows=3)
    structlog.get_logger("x").debug("too_fine")
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_events_are_key_value_lines_on_stderr_if_that_is_not_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (line,) = logged(capsys).splitlines()
    assert line.startswith("timestamp=")
    assert line.endswith('level=info event=unit_labelled unit_id="u 1" rows=3')


def test_json_lines_parse_and_keep_bound_ids_as_fields(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG_FORMAT_VARIABLE, "json")
    with structlog.contextvars.bound_contextvars(run_id="r1"):
        event = json.loads(logged(capsys))
    assert (event["event"], event["run_id"], event["unit_id"]) == ("unit_labelled", "r1", "u 1")


@pytest.mark.parametrize("no_color", [True, False])
def test_no_color_is_honoured_on_the_console(
    no_color: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG_FORMAT_VARIABLE, "console")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    assert ("\x1b[" in logged(capsys)) is not no_color


def test_an_unknown_log_format_is_refused_and_the_known_ones_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LOG_FORMAT_VARIABLE, "xml")
    with pytest.raises(UsageError, match="console, keyvalue, json"):
        log_format()


def test_chatty_libraries_log_from_warning_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    configure_logs()
    assert logging.getLogger("ray.serve").getEffectiveLevel() == logging.WARNING
    assert logging.getLogger("botocore").getEffectiveLevel() == logging.WARNING
    # Importing Serve does this.
    logging.getLogger("ray.serve").setLevel(logging.INFO)
    logging.getLogger("ray.serve").info("Started Serve")
    assert "Started Serve" not in caplog.text


def test_the_worker_hook_does_not_import_torch() -> None:
    """Each Ray worker runs the hook at its start."""
    module, name = WORKER_HOOK["worker_process_setup_hook"].rsplit(".", 1)
    code = f"import sys; from {module} import {name}; {name}(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_default_log_level_is_info(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOG_LEVEL_VARIABLE, raising=False)
    assert log_level() == 20
    monkeypatch.setenv(LOG_LEVEL_VARIABLE, "debug")
    assert log_level() == 10
    monkeypatch.setenv(LOG_LEVEL_VARIABLE, "loud")
    with pytest.raises(UsageError, match="loud"):
        log_level()
