"""Which cluster a command joins: the one `ray start` noted, if it is still there."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.serving.ray_session import _current_cluster


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_without_a_note_there_is_no_cluster(note: Path) -> None:
    assert _current_cluster() is None


def test_a_cluster_that_listens_is_joined(note: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        note.write_text(f"127.0.0.1:{server.getsockname()[1]}\n")
        assert _current_cluster() == note.read_text().strip()


def test_the_note_of_a_cluster_that_is_gone_is_ignored_at_once(note: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    note.write_text(f"127.0.0.1:{port}")
    assert _current_cluster() is None
    note.write_text("nonsense")
    assert _current_cluster() is None
