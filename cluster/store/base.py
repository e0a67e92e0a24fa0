"""What every object store can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One listed object. `etag` changes whenever its content does."""

    key: str
    size: int
    etag: str


class Store(ABC):
    """Objects under one prefix; keys are relative to it and use `/`.

    Instances are picklable and may be shared by threads. Every method raises StoreError once its
    retries are spent, and ObjectGone where the key names nothing.
    """

    uri: str

    @abstractmethod
    def list(self, prefix: str = "", suffixes: Sequence[str] = ()) -> list[ObjectInfo]:
        """Every object whose key starts with `prefix` and ends with one of `suffixes`, by key.

        A prefix without objects is an empty list; a missing bucket is an error.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """The object's size and etag, or None where there is none."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        """Bytes [start, stop) of the object, fewer where it ends earlier.

        With `etag`, raises ObjectGone if the object is no longer that one.
        """

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Writes or overwrites the object: for progress and summaries, never for results."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes, *, writer: str) -> bool:
        """Creates the object unless the key is taken; True if it is now ours.

        `writer` (ASCII) is unique to this call: where a lost answer leaves it open who created
        the object, it settles the matter.
        """

    def uri_of(self, key: str) -> str:
        """The object's address, for messages."""
        return f"{self.uri}/{key}"
