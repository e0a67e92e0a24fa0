"""The interface of an object store.

Guarantees of every implementation: writes are atomic, a reader never sees part of an object; a
listing is complete and sorted by key; trouble that passes within the store's patience costs time
alone, and what stays is a StoreError that names the object and, where it is known, the next step.
"""

from __future__ import annotations

import copy
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from cluster.store.patience import Patience


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One listed object."""

    key: str
    """Key relative to the store's prefix, with `/` as separator."""
    size: int
    """Bytes."""
    etag: str
    """Version of the content: it changes whenever the content does."""


class Store(ABC):
    """Objects under one prefix. Keys are relative to the prefix and use `/` as separator.

    Instances are picklable and thread-safe. Every method raises StoreError once its patience is
    spent; methods that read raise ObjectGone for a missing object, where nothing suggests that the
    whole store is missing.
    """

    uri: str
    """Address of the prefix, without a trailing slash."""

    def __init__(self, uri: str, patience: Patience | None) -> None:
        """patience: None for that of work in flight."""
        self.uri = uri
        self._patience = patience or Patience()

    def with_patience(self, seconds: float) -> Self:
        """This store with calls that give up after `seconds` of trouble."""
        other = copy.copy(self)
        other._patience = replace(self._patience, seconds=seconds)
        return other

    def is_here(self) -> bool:
        """Whether this machine sees the store at all, found out within seconds: False where a
        directory that was there before, on the machine that pickled this object, is not mounted."""
        return True

    def check_place(self) -> None:
        """Raises UsageError where no object could ever be, StoreError where none can be now. It
        leaves nothing behind."""
        return  # a bucket says so at any request

    @abstractmethod
    def list(self, prefix: str = "", suffixes: Sequence[str] = ()) -> list[ObjectInfo]:
        """Every object whose key starts with `prefix` and ends with one of `suffixes`, sorted by
        key. suffixes: all keys match if empty.

        A prefix without objects is an empty list; a missing bucket is an error.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """The object's size and etag; None if there is no such object."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The object's content."""

    @abstractmethod
    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        """Bytes [start, stop) of the object, fewer where it ends earlier.

        etag: the listed version; raises ObjectGone if the object was replaced. None: any version.
        """

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Creates or overwrites the object. For summaries; units are replaced on a condition."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes, *, writer: str) -> bool:
        """Creates the object unless the key exists. True if the object is this call's.

        writer: ASCII, unique to this call. It is stored with the object and decides who created it
        where the response to a request was lost.
        """

    @abstractmethod
    def put_if_match(self, key: str, data: bytes, *, etag: str, writer: str) -> bool:
        """Replaces the object if it still is the version `etag`. True if the object is now this
        call's; False where it is another version, or gone.

        writer: as in `put_if_absent`.
        """

    def honours_put_if_absent(self, key: str) -> bool:
        """Whether the store keeps the promise of `put_if_absent`, found out by writing an empty
        object `key` twice. A server that does not know the condition accepts both writes."""
        return not all(self.put_if_absent(key, b"", writer=uuid.uuid4().hex) for _ in range(2))

    def honours_put_if_match(self, key: str) -> bool:
        """Whether the store keeps the promise of `put_if_match`, found out by replacing an empty
        object `key` of a version that never was. For whoever replaces objects; creating them needs
        `honours_put_if_absent` alone."""
        self.put_if_absent(key, b"", writer=uuid.uuid4().hex)
        return not self.put_if_match(key, b"", etag="0" * 32, writer=uuid.uuid4().hex)

    def uri_of(self, key: str) -> str:
        """The object's address, for messages and logs."""
        return f"{self.uri}/{key}"
