"""The bytes that the walk over a tar needs, in few requests and without the members' data.

Guarantees: in an archive of members above 64 KiB, texts beside them not counted, their data is
skipped, which leaves about a fiftieth of it; smaller members are fetched whole, in large windows,
because a request costs more than their bytes. All bytes are of one version of the object.
"""

from __future__ import annotations

from cluster.store import ObjectInfo, Store

_FIRST_WINDOW = 2**16
_LARGEST_WINDOW = 2**22
# Skipping this much is worth a request of its own.
_WORTH_SKIPPING = 2**16
# Fetched at once behind skipped data: headers of small members often follow.
_SMALLEST_WINDOW, _LARGEST_JUMP = 2**9, 2**15
_MORE_TEXTS = 2**11
# Texts are smaller; they lie between the members whose size decides.
_SMALLEST_IMAGE = 2**13
_REMEMBERED = 8


class HeaderWindows:
    """One object, read forwards in windows that follow the size of its members. Not thread-safe."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self._store = store
        self._info = info
        self._window = _FIRST_WINDOW
        self._kept = b""
        self._start = 0
        self._read_until = 0
        self._image_size = 0.0  # of the members of late that are no texts, a running mean
        self._landed = 0  # byte behind the last skipped data
        self._needed = 0  # bytes that were needed behind such data, of late

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer where the object ends earlier. Raises ObjectGone if it was
        replaced after it was listed, StoreError where the store gave up."""
        stop = min(stop, self._info.size)
        if start >= stop:
            return b""
        skipped = start - self._read_until
        if skipped >= _SMALLEST_IMAGE:
            weight = _REMEMBERED if self._image_size else 1
            self._image_size += (skipped - self._image_size) / weight
        if not self._start <= start <= stop <= self._start + len(self._kept):
            self._choose_window(start, skipped)
            last = min(self._info.size, max(stop, start + self._window))
            key, etag = self._info.key, self._info.etag
            self._kept = self._store.get_range(key, start, last, etag=etag)
            self._start = start
        self._needed = max(self._needed, stop - self._landed)
        self._read_until = stop
        return self._kept[start - self._start : stop - self._start]

    def _choose_window(self, start: int, skipped: int) -> None:
        large = self._image_size >= _WORTH_SKIPPING
        if large and 0 < skipped < _SMALLEST_IMAGE:
            self._window = _MORE_TEXTS
        elif large and skipped:
            self._window = max(_SMALLEST_WINDOW, min(self._needed, _LARGEST_JUMP))
            self._landed = start
            self._needed = self._needed * 3 // 4
        elif self._kept:
            self._window = min(2 * self._window, _LARGEST_WINDOW)
