"""Objects in an S3 bucket, or in anything that speaks S3 and honours `If-None-Match: *`."""

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

Answer = TypeVar("Answer")

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
# Another conditional write of the same key is under way: the answer is not known yet.
_CONFLICT = {"ConditionalRequestConflict", "OperationAborted", "409"}
_ADVICE = {
    "NoSuchBucket": "the bucket does not exist: create it, or check AWS_ENDPOINT_URL and the name",
    "AccessDenied": "the credentials may not do this: grant s3:ListBucket, GetObject, PutObject",
    "403": "the credentials may not do this: grant s3:ListBucket, GetObject, PutObject",
    "InvalidAccessKeyId": "the access key is not known there: check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret does not fit the key: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired: renew the credentials and start again",
    "PermanentRedirect": "the bucket is in another region: set AWS_REGION to the bucket's",
    "NotImplemented": "this server lacks conditional writes (If-None-Match), which commits need",
}
_CLIENTS: dict[tuple[Any, ...], Any] = {}
_LOCK = threading.Lock()
_NO_ANSWER = (BotoConnectionError, HTTPClientError, ResponseStreamingError)


class S3Store(Store):
    """Keys under `s3://bucket/prefix`; all stores of a process share its client."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.uri = f"s3://{bucket}/{self._prefix}".rstrip("/")

    def __reduce__(self) -> tuple[type[S3Store], tuple[str, str]]:
        return S3Store, (self._bucket, self._prefix)

    def list(self, prefix: str = "", suffixes: Sequence[str] = ()) -> list[ObjectInfo]:
        found = []
        with self._translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    key = entry["Key"][len(self._prefix) :]
                    # Consoles make an empty object "folder/" for a folder.
                    if key.endswith("/") or (suffixes and not key.endswith(tuple(suffixes))):
                        continue
                    info = ObjectInfo(key=key, size=entry["Size"], etag=entry["ETag"].strip('"'))
                    found.append(info)
        return sorted(found, key=lambda info: info.key)

    def head(self, key: str) -> ObjectInfo | None:
        answer = self._head(key)
        if answer is None:
            return None
        return ObjectInfo(key=key, size=answer["ContentLength"], etag=answer["ETag"].strip('"'))

    def get(self, key: str) -> bytes:
        return self._read(key)

    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        if start >= stop:
            return b""
        condition = {} if etag is None else {"IfMatch": f'"{etag}"'}
        return self._read(key, Range=f"bytes={start}-{stop - 1}", **condition)

    def put(self, key: str, data: bytes) -> None:
        with self._translated(key):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data)

    def put_if_absent(self, key: str, data: bytes, *, writer: str) -> bool:
        with self._translated(key):
            return self._retried(key, lambda: self._create(key, data, writer))

    def _create(self, key: str, data: bytes, writer: str) -> bool:
        try:
            self._client.put_object(
                Bucket=self._bucket,
                Key=self._prefix + key,
                Body=data,
                IfNoneMatch="*",
                Metadata={"writer": writer},
            )
        except ClientError as error:
            if _code(error) not in _TAKEN:
                raise
            # Not lost yet: a PUT whose answer never came is resent, by botocore or by us, and is
            # refused because of the first one. The writer recorded in the object tells.
            present = self._head(key)
            return present is not None and present.get("Metadata", {}).get("writer") == writer
        return True

    def _head(self, key: str) -> dict[str, Any] | None:
        with self._translated(key):
            try:
                return self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
            except ClientError as error:
                if _code(error) in _MISSING:
                    return None
                raise

    def _read(self, key: str, **arguments: str) -> bytes:
        def attempt() -> bytes:
            answer = self._client.get_object(
                Bucket=self._bucket, Key=self._prefix + key, **arguments
            )
            return answer["Body"].read()

        with self._translated(key):
            return self._retried(key, attempt)

    def _retried(self, key: str, attempt: Callable[[], Answer]) -> Answer:
        """Retries what botocore does not: broken bodies, and conflicting conditional writes."""
        for number in range(1, _ATTEMPTS):
            try:
                return attempt()
            except ClientError as error:
                if _code(error) not in _CONFLICT:
                    raise
                reason = _code(error)
            except (IncompleteReadError, *_NO_ANSWER) as error:
                reason = type(error).__name__
            logger.warning("store_retry", uri=self.uri_of(key), attempt=number, reason=reason)
            time.sleep(0.2 * 2**number)
        return attempt()

    @property
    def _client(self) -> Any:
        return _shared_client()

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        uri = self.uri_of(key)
        try:
            yield
        except ClientError as error:
            code = _code(error)
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
        except _NO_ANSWER as error:
            endpoint = self._client.meta.endpoint_url
            raise StoreError(
                f"{uri}: no answer from {endpoint}; check AWS_ENDPOINT_URL and the network "
                f"({type(error).__name__})"
            ) from error
        except BotoCoreError as error:
            raise StoreError(f"{uri}: {error}") from error


def _shared_client() -> Any:
    """The process's client for its present AWS_* variables: making one takes a second of CPU,
    and every unit that is read brings a store of its own."""
    variables = ((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    key = (os.getpid(), *sorted(variables))
    with _LOCK:
        if key not in _CLIENTS:
            # A session of its own: boto3's default session is not safe to use from threads.
            _CLIENTS[key] = boto3.session.Session().client("s3", config=_CONFIG)
        return _CLIENTS[key]


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
