"""One name, one thing: no two classes and no two files of one name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sppruner", "cluster", "jobs")

# Files that mean the same in every folder.
COMMON = {"__init__.py", "base.py", "README.md", "RESULTS.md"}
# A deprecated module that forwards to `cluster.serving`, for `serve run cluster.fleet:build`.
SHIMS = {"cluster/fleet.py"}


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(f"{file.relative_to(ROOT)}:{node.lineno}")
    twice = [f"{name}: {', '.join(found)}" for name, found in places.items() if len(found) > 1]
    assert not twice, "\n".join(twice)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_files_of_a_package_share_a_name(package: str) -> None:
    places = defaultdict(list)
    for file in sorted((ROOT / package).rglob("*")):
        place = file.relative_to(ROOT).as_posix()
        if file.suffix in (".py", ".md") and file.name not in COMMON and place not in SHIMS:
            places[file.name].append(place)
    twice = [", ".join(found) for found in places.values() if len(found) > 1]
    assert not twice, "\n".join(twice)
