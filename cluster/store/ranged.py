"""A read-only file over ranged requests, for parsers that need `seek` and `read`.

Guarantees: all bytes are of one version of the object; a sequential read makes one request per
window; memory is bounded by the larger of the window and the largest single read.
"""

from __future__ import annotations

import io
import os

from cluster.store.base import ObjectInfo, Store


class RangedFile(io.RawIOBase):
    """One object as a file. Not thread-safe.

    Each request fetches at least `window` bytes, and the last response is kept. Reads raise
    ObjectGone if the object was replaced after it was listed.
    """

    def __init__(self, store: Store, info: ObjectInfo, *, window: int = 64 * 2**10) -> None:
        """window: fewest bytes of one request, except at the end of the object."""
        super().__init__()
        self._store = store
        self._info = info
        self._window = window
        self._position = 0
        self._kept = b""
        self._kept_start = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._info.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        end = self._info.size
        stop = end if size is None or size < 0 else min(end, self._position + size)
        data = self.read_range(self._position, stop)
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the object, from the kept response if that holds them."""
        if start >= stop:
            return b""
        if not self._kept_start <= start <= stop <= self._kept_start + len(self._kept):
            # Footers are read backwards from the end, so there the window extends backwards.
            first = min(start, max(0, self._info.size - self._window))
            last = min(self._info.size, max(stop, first + self._window))
            key, etag = self._info.key, self._info.etag
            self._kept = self._store.get_range(key, first, last, etag=etag)
            self._kept_start = first
        offset = start - self._kept_start
        return self._kept[offset : offset + stop - start]
