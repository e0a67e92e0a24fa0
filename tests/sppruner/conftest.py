"""`--matrix FILE` writes the outcome of every test marked `matrix` as a Markdown table: pass, FAIL,
or, where a family cannot and the test has seen it refused, the reason. A test that fills several
cells writes them to the fixture `matrix`.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_cells = pytest.StashKey[dict[tuple[str, str], str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", type=Path, help="write the matrix of marked tests to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_cells] = {}


@pytest.fixture
def matrix(request: pytest.FixtureRequest) -> dict[tuple[str, str], str]:
    """Cells by (family, column)."""
    return request.config.stash[_cells]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    report = yield
    if report.when == "call" and item.get_closest_marker("matrix") is not None:
        row, column = item.callspec.params["family"], item.callspec.params["check"]  # type: ignore[attr-defined]
        said = dict(report.user_properties).get("cell", "pass")
        item.config.stash[_cells][row, column] = said if report.passed else "FAIL"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    cells = session.config.stash[_cells]
    path: Path | None = session.config.getoption("--matrix", default=None)
    if path is None or not cells:
        return
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    lines = [f"| family | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {row} | {' | '.join(cells.get((row, column), 'not run') for column in columns)} |"
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n")
