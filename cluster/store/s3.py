"""Objects in an S3 bucket, or in any server that speaks S3 and honours `If-None-Match: *`.

Guarantees: a create-if-absent whose response was lost, or that botocore resent, still reports who
created the object, from the writer in its metadata; broken response bodies and write conflicts are
retried; every botocore error becomes a StoreError, which names the setting to check if one is
known to cause it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import boto3
import structlog
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError

from cluster.errors import ObjectGone, StoreError
from cluster.store.base import ObjectInfo, Store

logger = structlog.get_logger(__name__)

_T = TypeVar("_T")

_CONFIG = Config(
    retries={"mode": "adaptive", "max_attempts": 5},
    connect_timeout=5,
    read_timeout=60,
    max_pool_connections=32,
)
_ATTEMPTS = 4
_MISSING = {"NoSuchKey", "404", "NotFound"}
_CHANGED = {"PreconditionFailed", "412", "InvalidRange", "416"}
_TAKEN = {"PreconditionFailed", "412"}
# Another conditional write of the same key is in progress, so the outcome is not known yet.
_CONFLICT = {"ConditionalRequestConflict", "OperationAborted", "409"}
_ADVICE = {
    "NoSuchBucket": "the bucket does not exist: create it, or check AWS_ENDPOINT_URL and the name",
    "AccessDenied": "the credentials lack a permission: grant s3:ListBucket, GetObject, PutObject",
    "403": "the credentials lack a permission: grant s3:ListBucket, GetObject, PutObject",
    "InvalidAccessKeyId": "the server does not know the access key: check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is of another access key: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired: renew the credentials and start again",
    "PermanentRedirect": "the bucket is in another region: set AWS_REGION to the bucket's",
    "NotImplemented": "this server lacks conditional writes (If-None-Match, If-Match), needed here",
}
_CLIENTS: dict[tuple[Any, ...], Any] = {}
_LOCK = threading.Lock()
_CONNECTION_ERRORS = (BotoConnectionError, HTTPClientError, ResponseStreamingError)


class S3Store(Store):
    """Keys under `s3://bucket/prefix`. All stores of a process share one client."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.uri = f"s3://{bucket}/{self._prefix}".rstrip("/")

    def __reduce__(self) -> tuple[type[S3Store], tuple[str, str]]:
        return S3Store, (self._bucket, self._prefix)

    def list(self, prefix: str = "", suffixes: Sequence[str] = ()) -> list[ObjectInfo]:
        found = []
        with self._translate_errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    key = entry["Key"][len(self._prefix) :]
                    # S3 consoles create an empty object "folder/" for a folder.
                    if key.endswith("/") or (suffixes and not key.endswith(tuple(suffixes))):
                        continue
                    info = ObjectInfo(key=key, size=entry["Size"], etag=entry["ETag"].strip('"'))
                    found.append(info)
        return sorted(found, key=lambda info: info.key)

    def head(self, key: str) -> ObjectInfo | None:
        response = self._head(key)
        if response is None:
            return None
        return ObjectInfo(key=key, size=response["ContentLength"], etag=response["ETag"].strip('"'))

    def get(self, key: str) -> bytes:
        return self._read(key)

    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        if start >= stop:
            return b""
        condition = {} if etag is None else {"IfMatch": f'"{etag}"'}
        return self._read(key, Range=f"bytes={start}-{stop - 1}", **condition)

    def put(self, key: str, data: bytes) -> None:
        with self._translate_errors(key):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data)

    def put_if_absent(self, key: str, data: bytes, *, writer: str) -> bool:
        with self._translate_errors(key):
            return self._retry(key, lambda: self._put_on(key, data, writer, IfNoneMatch="*"))

    def put_if_match(self, key: str, data: bytes, *, etag: str, writer: str) -> bool:
        with self._translate_errors(key):
            return self._retry(key, lambda: self._put_on(key, data, writer, IfMatch=f'"{etag}"'))

    def _put_on(self, key: str, data: bytes, writer: str, **condition: str) -> bool:
        """A PUT on a condition; whether the object is the writer's afterwards."""
        try:
            self._client.put_object(
                Bucket=self._bucket,
                Key=self._prefix + key,
                Body=data,
                Metadata={"writer": writer},
                **condition,
            )
        except ClientError as error:
            # If-Match on an object that is gone is answered with 404, like a missing bucket.
            if "IfMatch" in condition and _error_code(error) in _MISSING:
                return False
            if _error_code(error) not in _TAKEN:
                raise
            # A PUT whose response was lost is resent, by botocore or by `_retry`, and is refused
            # because of itself. The writer in the object's metadata decides whose object it is.
            present = self._head(key)
            return present is not None and present.get("Metadata", {}).get("writer") == writer
        return True

    def _head(self, key: str) -> dict[str, Any] | None:
        with self._translate_errors(key):
            try:
                return self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
            except ClientError as error:
                if _error_code(error) in _MISSING:
                    return None
                raise

    def _read(self, key: str, **arguments: str) -> bytes:
        def attempt() -> bytes:
            response = self._client.get_object(
                Bucket=self._bucket, Key=self._prefix + key, **arguments
            )
            return response["Body"].read()

        with self._translate_errors(key):
            return self._retry(key, attempt)

    def _retry(self, key: str, attempt: Callable[[], _T]) -> _T:
        """Retries what botocore does not, broken response bodies and write conflicts, and goes on
        with connections where botocore gave up."""
        for number in range(1, _ATTEMPTS):
            try:
                return attempt()
            except ClientError as error:
                if _error_code(error) not in _CONFLICT:
                    raise
                reason = _error_code(error)
            except (IncompleteReadError, *_CONNECTION_ERRORS) as error:
                reason = type(error).__name__
            logger.warning("store_retry", uri=self.uri_of(key), attempt=number, reason=reason)
            time.sleep(0.2 * 2**number)
        return attempt()

    @property
    def _client(self) -> Any:
        return _get_client()

    @contextmanager
    def _translate_errors(self, key: str) -> Iterator[None]:
        uri = self.uri_of(key)
        try:
            yield
        except ClientError as error:
            code = _error_code(error)
            if code in _MISSING:
                raise ObjectGone(f"{uri}: no such object") from error
            if code in _CHANGED:
                raise ObjectGone(f"{uri}: changed since it was listed") from error
            raise StoreError(f"{uri}: {_ADVICE.get(code, error)} ({code})") from error
        except (NoCredentialsError, PartialCredentialsError, TokenRetrievalError) as error:
            raise StoreError(
                f"{uri}: no usable credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE, or run under a role"
            ) from error
        except _CONNECTION_ERRORS as error:
            endpoint = self._client.meta.endpoint_url
            raise StoreError(
                f"{uri}: no answer from {endpoint}; check AWS_ENDPOINT_URL and the network "
                f"({type(error).__name__})"
            ) from error
        except BotoCoreError as error:
            raise StoreError(f"{uri}: {error}") from error


def _get_client() -> Any:
    """The process's client for its current AWS_* variables. Creating one takes a second of CPU, and
    each unit is read through a store that was unpickled for it."""
    variables = ((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    key = (os.getpid(), *sorted(variables))
    with _LOCK:
        if key not in _CLIENTS:
            # A new session: boto3's default session is not thread-safe.
            _CLIENTS[key] = boto3.session.Session().client("s3", config=_CONFIG)
        return _CLIENTS[key]


def _error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
