"""Objects in an S3 bucket, or in any server that speaks S3 and honours `If-None-Match: *`.

Guarantees: a conditional write whose answer was lost still reports whose object it is, from the
writer in its metadata; a body that was cut short is fetched again; every error of botocore becomes
a StoreError, which names the setting to check if one is known to cause it.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError, IncompleteReadError, ReadTimeoutError
from botocore.parsers import ResponseParserError

from cluster.errors import ObjectGone, StoreError, UsageError
from cluster.store.base import ObjectInfo, Store
from cluster.store.patience import Patience
from cluster.store.s3_errors import (
    CHANGED,
    FORBIDDEN,
    MISSING,
    OUT_OF_RANGE,
    REQUEST_ERRORS,
    Unsettled,
    error_code,
    lacks_credentials,
    passing_reason,
    store_error,
)

_T = TypeVar("_T")

_READ_TIMEOUT_S = 60
# Patience is the only layer that repeats requests: botocore's gives up after seconds, cannot look
# for credentials again, and would hide from us that an answer was lost.
_CONFIG = Config(
    retries={"mode": "standard", "total_max_attempts": 1},
    connect_timeout=5,
    read_timeout=_READ_TIMEOUT_S,
    max_pool_connections=32,
)
_CHUNK = 256 * 2**10
# A body that comes slower than this many bytes per second is as good as cut: it is asked for again.
_SLOWEST = 32 * 2**10
_CLIENTS: dict[tuple[Any, ...], Any] = {}
_LOCK = threading.Lock()


class S3Store(Store):
    """Keys under `s3://bucket/prefix`. All stores of a process share one client."""

    def __init__(self, bucket: str, prefix: str, *, patience: Patience | None = None) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        super().__init__(f"s3://{bucket}/{self._prefix}".rstrip("/"), patience)

    def list(self, prefix: str = "", suffixes: Sequence[str] = ()) -> list[ObjectInfo]:
        # By key: there are servers that list a key twice, on neighbouring pages or on one.
        found: dict[str, ObjectInfo] = {}
        token: str | None = None
        tokens = set[str]()
        while True:
            # A page is asked for again alone; a listing may have thousands.
            page, following = self._request(prefix, partial(self._list_page, prefix, token))
            # S3 consoles create an empty object "folder/" for a folder, the prefix's own too.
            objects = (info for info in page if info.key and not info.key.endswith("/"))
            found |= {i.key: i for i in objects if i.key.endswith(tuple(suffixes) or "")}
            if following is None:
                return [found[key] for key in sorted(found)]
            if following in tokens:
                raise StoreError(f"{self.uri}: the server's listing does not go on after a page")
            token = following
            tokens.add(token)

    def head(self, key: str) -> ObjectInfo | None:
        def attempt(client: Any) -> ObjectInfo | None:
            present = self._head(client, key)
            if present is None:
                return None
            return ObjectInfo(key=key, size=present["ContentLength"], etag=_etag(present))

        return self._request(key, attempt)

    def get(self, key: str) -> bytes:
        return self._request(key, lambda client: self._get(client, key))

    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        if start >= stop:
            return b""
        return self._request(key, lambda client: self._get_range(client, key, start, stop, etag))

    def put(self, key: str, data: bytes) -> None:
        self._request(key, lambda client: client.put_object(**self._named(key), Body=data))

    def put_if_absent(self, key: str, data: bytes, *, writer: str) -> bool:
        return self._request(
            key, lambda client: self._put_on(client, key, data, writer, IfNoneMatch="*")
        )

    def put_if_match(self, key: str, data: bytes, *, etag: str, writer: str) -> bool:
        return self._request(
            key, lambda client: self._put_on(client, key, data, writer, IfMatch=f'"{etag}"')
        )

    # One attempt each

    def _named(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _list_page(
        self, prefix: str, token: str | None, client: Any
    ) -> tuple[Sequence[ObjectInfo], str | None]:
        """One page of the listing, and the token of the page after it."""
        arguments = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        if token is not None:
            arguments["ContinuationToken"] = token
        page = client.list_objects_v2(**arguments)
        infos = [
            ObjectInfo(key=e["Key"][len(self._prefix) :], size=e["Size"], etag=_etag(e))
            for e in page.get("Contents", ())
        ]
        return infos, page["NextContinuationToken"] if page["IsTruncated"] else None

    def _put_on(self, client: Any, key: str, data: bytes, writer: str, **condition: str) -> bool:
        """A PUT on a condition; whether the object is the writer's afterwards."""
        try:
            client.put_object(
                **self._named(key), Body=data, Metadata={"writer": writer}, **condition
            )
        except ClientError as error:
            # If-Match on an object that is gone is answered with 404.
            if error_code(error) not in CHANGED and not self._is_missing(client, error):
                raise
            # A PUT whose answer was lost is sent again, and is refused because of itself. The
            # writer in the object's metadata decides whose object it is.
            present = self._head(client, key)
            if present is None and "IfNoneMatch" in condition:
                raise Unsettled("refused for an object that is not there") from error
            return present is not None and present.get("Metadata", {}).get("writer") == writer
        return True

    def _head(self, client: Any, key: str) -> dict[str, Any] | None:
        try:
            return client.head_object(**self._named(key))
        except ClientError as error:
            if self._is_missing(client, error):
                return None
            raise

    def _is_missing(self, client: Any, error: ClientError) -> bool:
        """Whether an object is missing. A 404 that does not say what is missing may mean the
        bucket, or come from a proxy whose server is away: then the bucket is asked for."""
        code = error_code(error)
        if code in MISSING and code != "NoSuchKey":
            try:
                client.head_bucket(Bucket=self._bucket)
            except ClientError as other:
                if error_code(other) in MISSING:
                    raise ClientError({"Error": {"Code": "NoSuchBucket"}}, "HeadBucket") from other
                if error_code(other) not in FORBIDDEN:
                    raise
        return code in MISSING

    def _get(self, client: Any, key: str) -> bytes:
        response = client.get_object(**self._named(key))
        size, headers = response.get("ContentLength"), response["ResponseMetadata"]["HTTPHeaders"]
        if not _etag(response) or (size is None and "transfer-encoding" not in headers):
            raise ResponseParserError("the answer does not say how long its body is")
        return self._body(response, size)

    def _get_range(self, client: Any, key: str, start: int, stop: int, etag: str | None) -> bytes:
        condition = {} if etag is None else {"IfMatch": f'"{etag}"'}
        try:
            response = client.get_object(
                **self._named(key), Range=f"bytes={start}-{stop - 1}", **condition
            )
        except ClientError as error:
            if error_code(error) in OUT_OF_RANGE:  # nothing there: of this version?
                present = self._head(client, key)
                if present is not None and etag in (None, _etag(present)):
                    return b""
            elif error_code(error) in MISSING:
                self._is_missing(client, error)
            raise
        if etag not in (None, _etag(response)):
            response["Body"].close()
            raise ObjectGone(f"{self.uri_of(key)}: changed since it was listed")
        # Never the whole of an object that was asked for in part: it may be of any size.
        given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.get("ContentRange", ""))
        if given is None or int(given[1]) != start or int(given[2]) >= stop:
            response["Body"].close()
            raise StoreError(f"{self.uri_of(key)}: this server ignores Range, needed here")
        size = stop - start if given[3] == "*" else min(stop, int(given[3])) - start
        return self._body(response, size)

    def _body(self, response: dict[str, Any], size: int | None) -> bytes:
        """The body of an answer, of exactly `size` bytes; None where its end says that it ends."""
        body, clock = response["Body"], self._patience.clock
        chunks, got, began = [], 0, clock.now()
        try:
            while chunk := body.read(_CHUNK):
                chunks.append(chunk)
                got += len(chunk)
                if size is not None and got > size:
                    break
                if clock.now() - began > _READ_TIMEOUT_S + got / _SLOWEST:
                    raise ReadTimeoutError(endpoint_url=self.uri)
            if size is not None and got != size:
                raise IncompleteReadError(actual_bytes=got, expected_bytes=size)
        except BaseException:
            body.close()
            raise
        return b"".join(chunks)

    # Requests

    def _request(self, key: str, attempt: Callable[[Any], _T]) -> _T:
        """The result of `attempt` with a client, repeated within the store's patience."""

        endpoint = "AWS"

        def with_client() -> _T:
            nonlocal endpoint
            client = None
            try:
                client = self._client()
                endpoint = client.meta.endpoint_url
                return attempt(client)
            except KeyError as error:  # a proxy's page, for example, has status 200 and no ETag
                raise ResponseParserError(f"the answer lacks {error}") from error
            except Exception as error:
                if lacks_credentials(error):
                    _forget(client)
                raise

        try:
            return self._patience.retry(self.uri, with_client, passing_reason)
        except REQUEST_ERRORS as error:
            patience = self._patience.seconds
            raise store_error(error, self.uri_of(key), endpoint, patience) from error

    def _client(self) -> Any:
        return _get_client()


def _get_client() -> Any:
    """The process's client for its current AWS_* variables. Creating one takes a second of CPU, and
    each unit is read through a store that was unpickled for it."""
    variables = ((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    key = (os.getpid(), *sorted(variables))
    with _LOCK:
        if key not in _CLIENTS:
            # A new session: boto3's default session is not thread-safe.
            try:
                _CLIENTS[key] = boto3.session.Session().client("s3", config=_CONFIG)
            except ValueError as error:
                raise UsageError(f"{error}: check AWS_ENDPOINT_URL, http://host:port") from error
        return _CLIENTS[key]


def _forget(client: Any) -> None:
    """The next request looks for credentials anew: in variables, files, and the node's role."""
    with _LOCK:
        for key in [key for key, kept in _CLIENTS.items() if kept is client]:
            del _CLIENTS[key]


def _etag(answer: dict[str, Any]) -> str:
    """Raises KeyError for an answer without one, which is none of an S3 server."""
    etag: str = answer["ETag"]
    return etag.strip('"')
