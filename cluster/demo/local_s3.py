"""A local S3 server for the embedded demonstration and the tests.

It holds objects in memory, in a child process that ends with this process, even if it is killed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import TracebackType
from typing import Any

import boto3
import structlog

from cluster.errors import StoreError, UsageError

logger = structlog.get_logger(__name__)

# Port 0 lets the system choose; the printed port signals that the server is up; the end of stdin,
# which comes even if the parent is killed, makes the server exit.
_SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)  # otherwise one line per request
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class LocalS3:
    """Context manager: starts the server, points the AWS_* variables at it, creates `bucket`.

    The variables are restored on exit. Raises UsageError if moto is not installed, StoreError if
    the server does not start.
    """

    endpoint: str
    """URL of the server; set on entry."""
    environment: dict[str, str]
    """The AWS_* variables, for processes that do not inherit ours; set on entry."""

    def __init__(self, bucket: str = "local") -> None:
        self.bucket = bucket
        self._process: subprocess.Popen[str] | None = None
        self._client: Any = None
        self._previous: dict[str, str | None] = {}

    @property
    def uri(self) -> str:
        """s3:// URI of the bucket."""
        return f"s3://{self.bucket}"

    def __enter__(self) -> LocalS3:
        if any(importlib.util.find_spec(name) is None for name in ("moto", "flask")):
            raise UsageError(
                "the embedded S3 server needs moto: pip install 'sppruner[local]', "
                "or give --input and --output"
            )
        command = [sys.executable, "-c", _SERVER]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        if not port:
            self._stop()
            raise StoreError("the embedded S3 server did not start; its error is above")
        self.endpoint = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_REGION": "us-east-1",
        }
        try:
            self.create_bucket(self.bucket)
        except BaseException:
            self._stop()
            raise
        self._previous = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        logger.info("local_s3_started", endpoint=self.endpoint, pid=self._process.pid)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, value in self._previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._stop()

    def create_bucket(self, name: str) -> None:
        """Creates an empty bucket on this server."""
        if self._client is None:
            self._client = boto3.session.Session().client(
                "s3",
                endpoint_url=self.endpoint,
                region_name="us-east-1",
                aws_access_key_id="local",
                aws_secret_access_key="local",
            )
        self._client.create_bucket(Bucket=name)

    def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        if self._client is not None:
            self._client.close()
            self._client = None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._process = None
