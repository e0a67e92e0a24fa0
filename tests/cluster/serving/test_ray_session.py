"""The cluster that a command joins: the one whose address `ray start` recorded, if it listens."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.serving.ray_session import _current_cluster


@pytest.fixture
def address_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_without_an_address_file_there_is_no_cluster(address_file: Path) -> None:
    assert _current_cluster() is None


def test_a_cluster_that_listens_at_the_recorded_address_is_joined(address_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address_file.write_text(f"127.0.0.1:{server.getsockname()[1]}\n")
        assert _current_cluster() == address_file.read_text().strip()


def test_the_address_of_a_stopped_cluster_is_ignored_without_waiting(address_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address_file.write_text(f"127.0.0.1:{port}")
    assert _current_cluster() is None
    address_file.write_text("nonsense")
    assert _current_cluster() is None
