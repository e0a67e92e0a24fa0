"""The local S3 server runs while entered and is gone afterwards, even if its parent is killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from urllib.parse import urlparse

import pytest
from botocore.exceptions import ParamValidationError

from cluster.demo.local_s3 import LocalS3
from cluster.errors import UsageError
from cluster.store import open_store


def answers(endpoint: str) -> bool:
    address = urlparse(endpoint)
    assert address.hostname is not None
    assert address.port is not None
    with socket.socket() as connection:
        return connection.connect_ex((address.hostname, address.port)) == 0


def test_it_serves_while_entered_and_restores_the_environment() -> None:
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with LocalS3("demo") as server:
        open_store(f"{server.uri}/a").put("x", b"1")
        assert open_store("s3://demo").get("a/x") == b"1"
        assert os.environ["AWS_ENDPOINT_URL"] == server.endpoint
    after = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    assert after == before
    assert not answers(server.endpoint)


def test_it_ends_when_its_parent_is_killed() -> None:
    """A killed run must not leave a server behind on the user's machine."""
    script = (
        "import os, signal; from cluster.demo.local_s3 import LocalS3\n"
        "server = LocalS3('demo').__enter__(); print(server.endpoint, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    endpoint = answer.stdout.split()[-1]
    deadline = time.monotonic() + 10
    while answers(endpoint) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not answers(endpoint)


def test_it_stops_where_it_cannot_create_its_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    server = LocalS3("No Bucket Name")
    with pytest.raises(ParamValidationError):
        server.__enter__()
    assert dict(os.environ) == before
    assert not answers(server.endpoint)


def test_without_moto_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'sppruner\[local\]'"):
        LocalS3().__enter__()
