"""A real S3 server in its own process, shared by the session; a fresh bucket per test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from cluster.local_s3 import LocalS3

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[LocalS3]:
    """The server; AWS_* point at it until the session ends."""
    with LocalS3("first") as server:
        yield server


@pytest.fixture
def s3(s3_server: LocalS3) -> str:
    """The URI of a fresh, empty bucket."""
    name = f"bucket-{next(_NUMBERS)}"
    s3_server.create_bucket(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def local_ray(s3_server: LocalS3, local_ray: None) -> None:
    """The session's Ray, started after the server: its workers inherit the AWS_* variables."""
