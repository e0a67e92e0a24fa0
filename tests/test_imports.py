"""What a process may import: the arrows of the layout, and no torch where no model runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Who may import whom, besides itself and the world outside.
ALLOWED = {"sppruner": set(), "cluster": {"sppruner"}, "jobs": {"cluster", "sppruner"}}
FOREIGN_TO_THE_SCIENCE = {"ray", "boto3", "botocore", "fastapi", "httpx", "pyarrow"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_point_from_jobs_to_cluster_to_the_science(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        others = imported(file) & set(ALLOWED) - {package}
        assert others <= ALLOWED[package], f"{file} imports {others}"


def test_the_science_knows_no_cluster_no_store_and_no_http() -> None:
    for file in (ROOT / "sppruner").rglob("*.py"):
        assert not imported(file) & FOREIGN_TO_THE_SCIENCE, file


@pytest.mark.parametrize(
    "module",
    [
        "cluster.corpus.source",
        "cluster.runs.labeller",
        "cluster.output.commit",
        "cluster.serving.http.app",
    ],
)
def test_workers_that_run_no_model_do_not_load_torch(module: str) -> None:
    """Each of these is imported in every reader, caller or sink process: torch costs it seconds."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
