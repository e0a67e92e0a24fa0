"""Indexing a tar fetches its headers, not its data, where the members are large enough."""

from __future__ import annotations

import random
import tarfile

import pytest

from cluster.corpus.header_windows import HeaderWindows
from cluster.corpus.tar_header import BLOCK, pad
from cluster.corpus.tar_index import index_tar
from cluster.store import ObjectInfo

SHARES = [0.7 + 0.05 * number for number in range(13)]
"""Images as large as each other are found in no corpus: their sizes over the mean, in turn."""


class DrawnArchive:
    """A store of one tar that is made where it is read: `rounds` times 13 samples of an image of
    about `size` bytes and, with `text`, a caption. It counts requests and bytes."""

    def __init__(self, *, rounds: int, size: int, text: bool) -> None:
        self.requests = self.bytes = 0
        self.members = rounds * len(SHARES)
        self._rounds = rounds
        self._headers: list[tuple[int, str, int]] = []  # where in a round, name's end, size
        at = 0
        for number in random.Random(size).sample(range(len(SHARES)), len(SHARES)):
            files = [(f"-{number}.jpg", int(size * SHARES[number]))]
            for suffix, length in [*files, *([(f"-{number}.txt", 300)] if text else [])]:
                self._headers.append((at, suffix, length))
                at += BLOCK + pad(length)
        self._stride = at
        self.info = ObjectInfo(key="a.tar", size=rounds * at + 20 * BLOCK, etag="e")

    def uri_of(self, key: str) -> str:
        return key

    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        self.requests += 1
        self.bytes += stop - start
        data = bytearray(b"d" * (stop - start))
        for number in range(start // self._stride, stop // self._stride + 1):
            position = number * self._stride
            if number >= self._rounds:
                self._write(data, position - start, bytes(20 * BLOCK))
                break
            for at, suffix, size in self._headers:
                if not start - BLOCK < position + at < stop:
                    continue
                header = tarfile.TarInfo(f"{number:08}{suffix}")
                header.size = size
                self._write(data, position + at - start, header.tobuf())
        return bytes(data)

    @staticmethod
    def _write(data: bytearray, at: int, content: bytes) -> None:
        first, last = max(0, at), min(len(data), at + len(content))
        if first < last:
            data[first:last] = content[first - at : last - at]


@pytest.mark.parametrize("text", [False, True], ids=["image", "image and text"])
@pytest.mark.parametrize(
    ("size", "share", "requests_each"),
    [(20_000, 1.01, 0.05), (100_000, 0.02, 1.1), (1_000_000, 0.02, 1.1), (5_000_000, 0.02, 1.1)],
)
def test_planning_reads_a_fiftieth_of_large_members_and_small_ones_in_few_requests(
    size: int, share: float, requests_each: float, text: bool
) -> None:
    rounds = (2**31 if size >= 1_000_000 else 2**28) // size // len(SHARES)
    store = DrawnArchive(rounds=rounds, size=size, text=text)
    index = index_tar(store, store.info, unit_rows=256, unit_bytes=2**26)  # type: ignore[arg-type]
    assert (index.rows, index.unread_bytes, index.warnings) == (store.members, 0, ())
    assert store.bytes <= share * store.info.size
    assert store.requests <= requests_each * store.members + 20


def test_any_order_of_reads_gives_the_bytes_of_the_object() -> None:
    store = DrawnArchive(rounds=3, size=90_000, text=True)
    windows = HeaderWindows(store, store.info)  # type: ignore[arg-type]
    whole = store.get_range("a.tar", 0, store.info.size)
    size = store.info.size
    for start in (0, 512, 70_000, 3_000_000, 100, size - 10, 2_000_000, size, 0):
        for length in (0, 1, 512, 100_000):
            assert windows.read(start, start + length) == whole[start : start + length]
