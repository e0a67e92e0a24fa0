"""The version of the installed code: a hash of every source file that a replica may run."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

_PACKAGES: Final = ("cluster", "sppruner")


@cache
def code_version() -> str:
    """Equal in every process and on every machine that has the same sources."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        _update(digest, files(package), package)
    return digest.hexdigest()[:12]


def _update(digest: hashlib._Hash, place: Traversable, name: str) -> None:
    if place.is_dir():
        for child in sorted(place.iterdir(), key=lambda child: child.name):
            _update(digest, child, f"{name}/{child.name}")
    elif name.endswith(".py"):
        data = place.read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
