"""Object stores: keys under one prefix, on S3 or on a local disk.

Exactly-once output depends on one guarantee only, that of `put_if_absent`: of any number of
concurrent writers of one key, exactly one receives True, and a reader sees either no object or
that writer's complete object.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cluster.errors import UsageError
from cluster.store.base import ObjectInfo, Store
from cluster.store.local import LocalStore
from cluster.store.patience import FIRST_CONTACT_S, Patience
from cluster.store.ranged import RangedFile
from cluster.store.s3 import S3Store

__all__ = [
    "FIRST_CONTACT_S",
    "LocalStore",
    "ObjectInfo",
    "Patience",
    "RangedFile",
    "S3Store",
    "Store",
    "open_store",
]


def open_store(uri: str | os.PathLike[str], *, patience: Patience | None = None) -> Store:
    """The store at `s3://bucket/prefix`, `file:///path` or a plain path. No request is made.

    patience: how long trouble may last in one call; None for that of work in flight. S3 is
    configured by the usual AWS_* variables, AWS_ENDPOINT_URL among them. Raises UsageError for any
    other scheme, another host, an invalid bucket name and an empty path.
    """
    uri = os.fspath(uri)
    if not uri.strip():
        raise UsageError("a path is empty: give s3://bucket/prefix or a local path")
    if re.match(r"(s3|file|gs|https?):(?!//)", uri):
        raise UsageError(f"{uri}: write {uri.partition(':')[0]}:// with two slashes")
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStore(Path(uri).absolute(), patience=patience)
    if scheme == "file":
        host, _, path = rest.partition("/")
        # RFC 8089: an empty host and localhost are this machine, and no part of the path.
        if host.lower() not in ("", "localhost"):
            raise UsageError(
                f"{uri}: {host} is the name of a host, and files are read on this one alone; write "
                "file:///path with three slashes"
            )
        return LocalStore(Path("/" + path.lstrip("/")), patience=patience)
    if scheme != "s3":
        raise UsageError(f"{uri}: cannot open {scheme}://; use s3://bucket/prefix or a local path")
    bucket, _, prefix = rest.partition("/")
    if len(bucket) < 3:
        raise UsageError(f"{uri}: no bucket of at least 3 characters; use s3://bucket/prefix")
    return S3Store(bucket, prefix, patience=patience)
