"""One member of an untrusted tar: its header block, and the extended headers before it.

Guarantees: sizes and header lengths are bounded, and extended headers are parsed in linear time;
any bytes give a member or raise ArchiveDamaged; links and devices are described, never followed.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from cluster.errors import ArchiveDamaged

BLOCK = 512
"""Bytes of a tar block. Headers are one block; data is padded to whole blocks."""
MAX_EXTENDED_HEADER = 2**20
"""Largest GNU or PAX extended header that is read, bytes."""
MAX_SIZE = 2**60
"""Largest size of a member that a header may state, bytes."""

ReadRange: TypeAlias = Callable[[int, int], bytes]
"""Reads bytes [start, stop) of the archive, fewer where it ends earlier."""

EXTENDED = frozenset(
    {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, b"X", tarfile.XGLTYPE}
)
"""Types of the headers that describe the member behind them."""
_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
_SPARSE = "a sparse file; pack again without tar --sparse"
_REFUSED_TYPES = {
    tarfile.LNKTYPE: "a hard link; pack again with tar --hard-dereference",
    tarfile.SYMTYPE: "a symbolic link; pack again with tar -h",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: _SPARSE,
}
_NO_FILES = {
    tarfile.DIRTYPE,
    tarfile.XGLTYPE,
    b"D",  # in a dump of GNU tar: a directory, with the names in it as data
    b"V",  # GNU tar's label of the archive
    b"A",  # Solaris' access rights of the file behind it
}
_WITHOUT_DATA = {
    tarfile.DIRTYPE,
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
}
# Where a PAX header has the beginning of a long name, one of GNU's, told by its magic, has times.
_GNU_MAGIC, _MAGIC = b"ustar  \0", slice(257, 265)
_NAME = slice(0, 100)
# A sparse member in the GNU format: further blocks of its map, which its size does not count, stand
# before its data if this byte of its header, or of such a block, is not zero.
_MORE_MAP, _MORE_MAP_AGAIN = 482, 504
# A sparse member in the PAX formats looks like a regular one; its data lacks what is zero in the
# file, and may begin with the map.
_SPARSE_RECORDS = (b"GNU.sparse.", b"SUN.holesdata")
_SPARSE_NAME = b"GNU.sparse.name"
# In the name that GNU tar puts into the header itself; it tells where the records were lost.
_SPARSE_FOLDER = re.compile(r"(?:.*/)?GNUSparseFile\.\d+/[^/]*", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One entry of an archive."""

    name: str
    """Path in the archive, without a leading `./`."""
    start: int
    """Byte of its first header, extended headers included."""
    data_start: int
    """Byte where its data starts."""
    size: int
    """Bytes of its data."""
    stop: int
    """Byte after its padded data."""
    is_file: bool = True
    """Whether it stands for a file, of any kind; not a directory or a note about the archive."""
    refused: str | None = None
    """Why its data must not be used, as for a link; None where it may be."""


def parse_header(block: bytes) -> tarfile.TarInfo | None:
    """The header in a block; None where its checksum or one of its numbers is wrong."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    if block[_MAGIC] == _GNU_MAGIC:
        header.name = block[_NAME].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return header if 0 <= header.size <= MAX_SIZE else None


def read_member(read: ReadRange, start: int, stop: int) -> Member | None:
    """The member at `start`; None where a block of zeros stands there. Raises ArchiveDamaged, with
    the byte of the faulty block, for anything else and for a member that ends behind `stop`."""
    position = start
    extended: dict[str, str] = {}
    header = _read_header(read, position, stop)
    if header is None:
        return None
    while header.type in EXTENDED:
        extended |= _read_extended_header(read, position, stop, header)
        if header.type == tarfile.XGLTYPE and position == start:
            break  # of the archive, not of a member: the end mark may follow
        position += BLOCK + pad(header.size)
        described = _read_header(read, position, stop)
        if described is None:
            raise ArchiveDamaged(position, "zeros where a header belongs")
        header = described
    size = _parse_size(header, extended, position)
    data_start = position + BLOCK
    end = data_start + (pad(size) if header.type not in _WITHOUT_DATA else 0)
    path = extended.get("path") or header.name
    name = _decode_name(path).removeprefix("./")
    if header.type == tarfile.GNUTYPE_SPARSE and end <= stop:
        more = _map_bytes(read, position)
        data_start, end = data_start + more, end + more
    is_file = header.type not in _NO_FILES
    if end > stop:
        raise ArchiveDamaged(position, f"{name[:200]} is truncated", name if is_file else None)
    return Member(
        name=name,
        start=start,
        data_start=data_start,
        size=size,
        stop=end,
        is_file=is_file,
        refused=extended.get("refused") or _refuse_type(header.type) or _refuse_path(path),
    )


def pad(size: int) -> int:
    """Bytes of the blocks that hold `size` bytes."""
    return -(-size // BLOCK) * BLOCK


def _read_header(read: ReadRange, position: int, stop: int) -> tarfile.TarInfo | None:
    """The header block at `position`; None for a block of zeros."""
    block = read(position, min(position + BLOCK, stop))
    if len(block) < BLOCK:
        raise ArchiveDamaged(position, "no end mark" if not block else "a header is truncated")
    if not any(block):
        return None
    header = parse_header(block)
    if header is None:
        raise ArchiveDamaged(position, "a header is corrupt")
    return header


def _read_extended_header(
    read: ReadRange, position: int, stop: int, header: tarfile.TarInfo
) -> dict[str, str]:
    """Path and size of the next member, where a GNU or PAX extended header has them; and why it is
    refused, where it is for what stands there."""
    if header.size > MAX_EXTENDED_HEADER:
        raise ArchiveDamaged(position, f"an extended header of {header.size:,} bytes")
    if header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        return {}
    body = read(position + BLOCK, min(position + BLOCK + header.size, stop))
    if len(body) < header.size:
        raise ArchiveDamaged(position, "an extended header is truncated")
    is_name = header.type == tarfile.GNUTYPE_LONGNAME
    records = {b"path": body.partition(b"\0")[0]} if is_name else parse_pax(body)
    if not records or records.get(b"path") == b"":
        raise ArchiveDamaged(position, "an extended header is corrupt")
    found = {
        name: records[name.encode()].decode("utf-8", "surrogateescape")
        for name in ("path", "size")
        if name.encode() in records
    }
    if any(name.startswith(_SPARSE_RECORDS) for name in records):
        found["refused"] = _SPARSE
        if records.get(_SPARSE_NAME):
            found["path"] = records[_SPARSE_NAME].decode("utf-8", "surrogateescape")
    return found


def _map_bytes(read: ReadRange, position: int) -> int:
    """Bytes of the blocks behind the header of the GNU format at `position` that go on with the map
    of a sparse member. Raises ArchiveDamaged, with the byte behind those that were looked at, for
    more than can be meant."""
    flag = _MORE_MAP
    for length in range(0, MAX_EXTENDED_HEADER, BLOCK):
        if not any(read(position + length, position + length + BLOCK)[flag : flag + 1]):
            return length
        flag = _MORE_MAP_AGAIN
    raise ArchiveDamaged(position + MAX_EXTENDED_HEADER, "the map of a sparse file has no end")


def parse_pax(body: bytes) -> dict[bytes, bytes] | None:
    """The records `<length> <name>=<value>\\n` of a PAX header by name, the last of each; None
    where they are not such records."""
    records: dict[bytes, bytes] = {}
    position, end = 0, len(body.rstrip(b"\0"))
    while position < end:
        space = body.find(b" ", position, position + 8)
        digits = body[position : max(space, position)]
        if not digits.isdigit():
            return None
        stop = position + int(digits)
        equals = body.find(b"=", space, stop)
        if stop > len(body) or equals < 0 or body[stop - 1 : stop] != b"\n":
            return None
        records[body[space + 1 : equals]] = body[equals + 1 : stop - 1]
        position = stop
    return records


def _parse_size(header: tarfile.TarInfo, extended: dict[str, str], position: int) -> int:
    text = extended.get("size", str(header.size))
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ArchiveDamaged(position, f"a member size of {text[:40]!r}")
    return int(text)


def _decode_name(name: str) -> str:
    """The name as valid Unicode; bytes that are not UTF-8 become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _refuse_type(kind: bytes) -> str | None:
    if kind in _REGULAR or kind == tarfile.DIRTYPE:
        return None
    return _REFUSED_TYPES.get(kind, f"a member of type {kind!r}")


def _refuse_path(name: str) -> str | None:
    if _SPARSE_FOLDER.fullmatch(name):
        return _SPARSE
    if name.startswith("/") or ".." in name.split("/"):
        return "its path leads outside the archive"
    return None
