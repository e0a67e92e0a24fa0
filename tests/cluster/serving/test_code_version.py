"""The code version: a hash of sources, wherever they lie."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from cluster.serving.code_version import _update, code_version


def version(folder: Path) -> str:
    digest = sha256()
    _update(digest, folder, "package")
    return digest.hexdigest()


def test_every_process_that_has_the_same_sources_has_the_same_version(tmp_path: Path) -> None:
    code = "from cluster.serving.code_version import code_version; print(code_version())"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code]
    other = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert other.stdout.strip() == code_version()


def test_the_version_follows_names_and_contents_of_sources_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "room").mkdir(parents=True)
        (tmp_path / name / "a.py").write_text("x = 1")
        (tmp_path / name / "room" / "b.py").write_text("y = 2")
    one, two = tmp_path / "one", tmp_path / "two"
    known = version(one)
    (two / "__pycache__").mkdir()
    (two / "__pycache__" / "a.pyc").write_text("compiled")
    assert version(two) == known

    (two / "a.py").write_text("x = 2")
    changed = version(two)
    (two / "a.py").write_text("x = 1")
    (two / "room" / "b.py").rename(two / "room" / "c.py")
    assert len({known, changed, version(two)}) == 3
