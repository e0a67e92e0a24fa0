"""The library's modules import each other in one direction, imports for type checking included."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "sppruner"
# Lazy packages: their imports for type checking name what `__getattr__` loads on first use.
LAZY = {"sppruner", "sppruner.engine"}


def imports(name: str, file: Path) -> set[str]:
    """Modules of the library that a module names in its imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names - {name}


def modules() -> dict[str, Path]:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = modules()
    graph = {n: imports(n, f) & files.keys() for n, f in files.items() if n not in LAZY}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_relevance_and_stages_stand_below_selectors_and_adapters_below_both() -> None:
    files = modules()
    below = {
        "sppruner.types": ("selectors", "adapters", "stages", "relevance"),
        "sppruner.capabilities": ("selectors", "adapters", "stages", "relevance"),
        "sppruner.adapters": ("selectors", "stages", "relevance"),
        "sppruner.relevance": ("selectors", "stages"),
        "sppruner.stages": ("selectors", "relevance"),
    }
    for room, above in below.items():
        banned = tuple(f"sppruner.{name}" for name in above)
        for name, file in files.items():
            if name == room or name.startswith(f"{room}."):
                assert not [n for n in imports(name, file) if n.startswith(banned)], name
