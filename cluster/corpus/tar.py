"""The walk over an untrusted tar: every byte is a member's, padding, or damage that is reported.

Guarantees: the pieces of `walk_archive` lie one behind the other and cover the archive, whatever
its bytes; behind damage the walk goes on at the next valid header. Nothing is written to disk.
Damage is told from the archive's regular end, which Python's `tarfile` does not do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cluster.corpus.tar_header import (
    BLOCK,
    EXTENDED,
    MAX_EXTENDED_HEADER,
    Member,
    ReadRange,
    pad,
    parse_header,
    read_member,
)
from cluster.errors import ArchiveDamaged, TooManyMembers

RECORD = 20 * BLOCK
"""Bytes of a record: most writers pad an archive to whole records."""
MAX_MEMBERS = 5_000_000
"""Most members of an archive."""
MAX_ZERO_TAIL = 2**20
"""Most zeros behind the last member, bytes; above that an allocated file was never filled."""

# Between archives put behind each other: the end mark of two blocks, and zeros to a whole record.
_END_MARK = 2 * BLOCK
_MAX_PADDING = RECORD - BLOCK + _END_MARK
# Reads while searching: small at first, because most damage is.
_FIRST_SCAN, _LAST_SCAN = 2**12, 2**20
_MAGIC, _MAGIC_AT = b"ustar", 257
_CHECKSUM = slice(148, 154)
_NAME = slice(0, 100)
# The end of an extended header's body, where its own header block was lost.
_PATH_RECORD = re.compile(rb"\d (?:path|GNU\.sparse\.\w+)=.*\n\0{,511}\Z", re.DOTALL)
_PATH_BYTES = 2**13


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Zeros that belong to the format."""

    start: int
    """Byte of the first zero."""
    stop: int
    """Byte after the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Bytes that hold no readable member."""

    start: int
    """The first byte that was not read."""
    stop: int
    """The byte where reading goes on, or the archive's size. Equal to `start` where nothing but the
    end mark is missing."""
    reason: str
    """What is wrong there."""
    member: str | None = None
    """Name of the member that the archive's end cuts short; None where none is known."""


def walk_archive(read: ReadRange, size: int) -> Iterator[Member | Padding | Damage]:
    """The whole archive of `size` bytes, piece by piece. Raises TooManyMembers for more than
    `MAX_MEMBERS`."""
    position = archive_start = 0
    for _ in range(MAX_MEMBERS):
        try:
            member = read_member(read, position, size)
        except ArchiveDamaged as error:
            damage = _find_end_of_damage(read, position, size, error)
            yield damage
            position = damage.stop
        else:
            if member is not None:
                yield member
                position = member.stop
                continue
            zeros = _judge_zeros(read, position, size, archive_start)
            yield zeros
            position = zeros.stop
            if isinstance(zeros, Padding):
                archive_start = position
        if position == size:
            return
    raise TooManyMembers(f"more than {MAX_MEMBERS:,} members in one archive: split it")


def walk_members(read: ReadRange, start: int, stop: int) -> Iterator[Member | Padding]:
    """Bytes [start, stop) of an archive, in which `walk_archive` found no damage. Raises
    ArchiveDamaged where there is some nevertheless."""
    position = start
    while position < stop:
        piece = read_member(read, position, stop) or Padding(start=position, stop=position + BLOCK)
        yield piece
        position = piece.stop


def _judge_zeros(read: ReadRange, start: int, size: int, archive_start: int) -> Padding | Damage:
    """What the zeros at `start` are. They are padding as the end of the archive; or before a header
    if they are as long, and end where, an end mark would before an archive that was appended."""
    stop = _skip_zeros(read, start, size)
    if stop == size:
        if size - start < _END_MARK:
            return Damage(start=start, stop=size, reason="the end mark is truncated")
        if size - start > MAX_ZERO_TAIL:
            return Damage(start=start, stop=size, reason=f"only zeros from byte {start:,} on")
        return Padding(start=start, stop=size)
    stop -= (stop - start) % BLOCK
    length = stop - start
    if parse_header(read(stop, min(stop + BLOCK, size))) is None:
        error = ArchiveDamaged(start, f"{length:,} zeros where a header belongs, then other bytes")
        return _find_end_of_damage(read, start, size, error)
    ends_record = stop % RECORD == 0 or (stop - archive_start) % RECORD == 0
    if length == _END_MARK or (_END_MARK < length <= _MAX_PADDING and ends_record):
        return Padding(start=start, stop=stop)
    reason = f"{length:,} zeros where a header belongs"
    return Damage(start=start, stop=_skip_cut_name(read, start, stop, size), reason=reason)


def _skip_zeros(read: ReadRange, position: int, size: int) -> int:
    """The first byte that is not zero, or `size`."""
    for start, stop in _scan(position, size):
        data = read(start, stop)
        zeros = len(data) - len(data.lstrip(b"\0"))
        if zeros < stop - start:
            return start + zeros
    return size


def _scan(position: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover [position, size), larger and larger ones, each but the last whole
    blocks."""
    length = _FIRST_SCAN
    while position < size:
        yield position, min(position + length, size)
        position += length
        length = min(4 * length, _LAST_SCAN)


def _find_end_of_damage(read: ReadRange, start: int, size: int, error: ArchiveDamaged) -> Damage:
    """The damage from `start` to the next valid header behind the faulty block."""
    faulty = parse_header(read(error.position, min(error.position + BLOCK, size)))
    # Inserted bytes may end within a block that is no header.
    stop = search = error.position if faulty is None else min(error.position + BLOCK, size)
    if faulty is not None and faulty.type in EXTENDED and faulty.size <= MAX_EXTENDED_HEADER:
        # Its body is at fault, so the name of the member behind it is lost.
        search = min(search + pad(faulty.size), size)
        stop = _skip_member(read, search, size)
    if stop == search:
        stop = _find_header(read, search, size)
        stop = _skip_cut_name(read, start, stop, size)
    member = error.member if stop == size else None
    return Damage(start=start, stop=stop, reason=str(error), member=member)


def _find_header(read: ReadRange, position: int, size: int) -> int:
    """The first byte from `position` on where a header stands, or `size`.

    A header has a valid checksum, and either the magic, at any byte, because bytes may be missing
    or inserted; or, as in the oldest format, no magic but a whole number of blocks before it.
    """
    for start, stop in _scan(position, size):
        data = read(start, min(stop + BLOCK, size))
        for offset in _header_candidates(data):
            if offset < stop - start and _is_header(data[offset : offset + BLOCK], size):
                return start + offset
    return size


def _header_candidates(data: bytes) -> list[int]:
    found = {match.start() - _MAGIC_AT for match in re.finditer(_MAGIC, data)}
    blocks = np.array(memoryview(data)[: len(data) // BLOCK * BLOCK], np.uint8).reshape(-1, BLOCK)
    digits = blocks[:, _CHECKSUM]
    octal = ((digits >= ord("0")) & (digits <= ord("7"))) | (digits == ord(" "))
    found.update((np.flatnonzero(octal.all(axis=1)) * BLOCK).tolist())
    return sorted(offset for offset in found if offset >= 0)


def _is_header(block: bytes, size: int) -> bool:
    header = parse_header(block) if len(block) == BLOCK else None
    if header is None or not header.name:
        return False
    return _MAGIC in block[_MAGIC_AT:] or (header.size <= size and header.name.isprintable())


def _skip_cut_name(read: ReadRange, start: int, stop: int, size: int) -> int:
    """`stop`, or the end of the member there if the damage [start, stop) may have taken the
    extended header with its whole name."""
    if stop == size:
        return stop
    name = read(stop, stop + BLOCK)[_NAME]
    before = read(max(start, stop - _PATH_BYTES), stop)
    cut = b"\0" not in name or b"?" in name or _PATH_RECORD.search(before) is not None
    return _skip_member(read, stop, size) if cut else stop


def _skip_member(read: ReadRange, position: int, size: int) -> int:
    """The byte behind the member at `position`; `position` where there is none, or one whose name
    an extended header gives."""
    header = parse_header(read(position, min(position + BLOCK, size)))
    if header is None or header.type in EXTENDED:
        return position
    return min(position + BLOCK + pad(header.size), size)
