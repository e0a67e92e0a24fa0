"""What a module may import: packages and rooms in one direction, and no torch where no model runs.

A room is a module or a subpackage directly below `sppruner`, `cluster` or `jobs`. Imports under
`TYPE_CHECKING` count as imports.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Which packages each package may import, besides itself and third parties.
ALLOWED = {"sppruner": set(), "cluster": {"sppruner"}, "jobs": {"cluster", "sppruner"}}
FOREIGN_TO_THE_SCIENCE = {"ray", "boto3", "botocore", "fastapi", "httpx", "pyarrow"}

# Bottom to top: a room imports rooms to the left of it or above its line, never the others.
# The `__init__` of a package is above all its rooms.
ORDER = {
    "sppruner": """
        errors spec conversation vqa cost types signals compact decoder capabilities proportions
        prompts adapters stages relevance selectors resolved_spec selection reports pruner
        tiny models engine
        pictures evaluation integrations
    """.split(),
    "cluster": """
        errors encoding termination unexpected config events logs metrics console other_node store
        protocol schema images
        corpus accounting output
        controller serving runs
        report demo
        fleet
    """.split(),  # fleet: the deprecated name that `serve run cluster.fleet:build` uses
    "jobs": """
        boundary arguments suites training
        overlays make_corpus demo_results labelling_cli
        answer_vqa api_key benchmark caption_corpus evaluate report retry_errors train_tiny tune
    """.split(),
}


@dataclass(frozen=True)
class Import:
    """One import statement of ours: its place, the module it stands in and the module it names."""

    place: str
    module: str
    imported: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def rooms(self) -> tuple[str, str]:
        """Rooms of the module and of the imported module; "" is the package's `__init__`."""
        room, other = ([*name.split("."), ""][1] for name in (self.module, self.imported))
        return room, other


def modules(package: str) -> dict[str, Path]:
    """Files by dotted name."""
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports(package: str) -> list[Import]:
    """Every import statement of a package, one entry for each module it names."""
    ours = {name for other in ALLOWED for name in modules(other)}
    return [
        Import(f"{file.relative_to(ROOT)}:{line}", module, name)
        for module, file in modules(package).items()
        for line, name in imported_names(file, ours)
    ]


def imported_names(file: Path, ours: set[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: import by absolute name"
            assert node.module is not None
            for alias in node.names:
                # `from cluster import images` names a module, `from sppruner import Budget` none.
                member = f"{node.module}.{alias.name}"
                yield node.lineno, member if member in ours else node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_point_from_jobs_to_cluster_to_the_science(package: str) -> None:
    for found in imports(package):
        other = found.imported.partition(".")[0]
        allowed = {package} | ALLOWED[package]
        assert other not in ALLOWED or other in allowed, f"{found.place} imports {other}"


def test_the_science_knows_no_cluster_no_store_and_no_http() -> None:
    for found in imports("sppruner"):
        other = found.imported.partition(".")[0]
        assert other not in FOREIGN_TO_THE_SCIENCE, f"{found.place} imports {other}"


@pytest.mark.parametrize("package", ORDER)
def test_every_room_has_one_place_in_the_order(package: str) -> None:
    rooms = {[*name.split("."), ""][1] for name in modules(package)} - {""}
    assert rooms <= set(ORDER[package]), "give the new room a place in ORDER"
    assert len(ORDER[package]) == len(set(ORDER[package]))


@pytest.mark.parametrize("package", ORDER)
def test_a_room_imports_only_rooms_below_it(package: str) -> None:
    height = {room: at for at, room in enumerate([*ORDER[package], ""])}
    upward = [
        found
        for found in imports(package)
        if found.imported.partition(".")[0] == package
        and found.rooms[0] != found.rooms[1]
        and height[found.rooms[0]] < height[found.rooms[1]]
    ]
    wrong = [f"{found.place} imports {found.rooms[1] or package} (above)" for found in upward]
    assert not wrong, "\n".join(dict.fromkeys(wrong))


@pytest.mark.parametrize("package", ORDER)
def test_modules_import_each_other_in_no_circle(package: str) -> None:
    """Also inside a room, where the order says nothing."""
    graph = TopologicalSorter[str]()
    for found in imports(package):
        if found.imported != found.module:
            graph.add(found.module, found.imported)
    try:
        graph.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    "module",
    [
        "cluster.corpus.source",
        "cluster.runs.labeller",
        "cluster.output.commit",
        "cluster.serving.http.app",
        "cluster.serving.janitor",
        # Ctrl-C while a command starts should find a handler, and --help should not take seconds.
        "jobs.caption_corpus",
        "jobs.answer_vqa",
    ],
)
def test_what_runs_no_model_does_not_load_torch(module: str) -> None:
    """Most are imported in every reader, caller or sink process: torch costs it seconds."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
