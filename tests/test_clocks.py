"""Nothing is measured or waited for by the date, which may be set at any time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READS = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "strftime"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
}
SHOWN = {
    "cluster/runs/planning.py",  # when a run was first planned
    "cluster/serving/http/app.py",  # `created` of OpenAI's answers
    "cluster/store/s3_errors.py",  # compared with the server's
}
"""Modules that read the date, to show it."""


def dates_read(source: str) -> Iterator[int]:
    """The lines in which a program reads the date."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            of = ast.unparse(node.value).rpartition(".")[2]
            if node.attr in READS.get(of, ()):
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (node.lineno for name in node.names if name.name in READS["time"])
        elif isinstance(node, ast.Import | ast.ImportFrom):  # under another name it is not found
            names = [name for name in node.names if name.asname not in (None, name.name)]
            hidden = {"time", "datetime", "date"}.intersection(name.name for name in names)
            yield from (node.lineno for _ in hidden)


def test_only_what_shows_a_date_reads_one() -> None:
    files = (file for top in ("cluster", "jobs", "sppruner") for file in (ROOT / top).rglob("*.py"))
    found = {
        file.relative_to(ROOT).as_posix() for file in files if list(dates_read(file.read_text()))
    }
    assert found == SHOWN


def test_dates_are_found_however_they_are_read() -> None:
    assert list(dates_read("import time\nstart = time.time()")) == [2]
    assert list(dates_read("import datetime\ndatetime.datetime.now()")) == [2]
    assert list(dates_read("from time import time, sleep")) == [1]
    assert list(dates_read("import time as t")) == [1]
    assert list(dates_read("from datetime import date\ndate.today()")) == [2]
    assert list(dates_read("import time\ntime.strftime('%c')")) == [2]
    assert not list(dates_read("import time\ntime.monotonic(); time.sleep(1)"))
