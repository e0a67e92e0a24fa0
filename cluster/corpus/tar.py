"""Untrusted tar archives as a stream of WebDataset samples.

Guarantees: nothing is written to disk; links and devices are reported, never followed; sizes,
member counts and header lengths are bounded; any bytes end the iteration or raise ArchiveDamaged.
Damage is distinguished from the regular end of the archive, which Python's `tarfile` does not do:
it takes a truncated header for the end.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from cluster.errors import ArchiveDamaged

BLOCK = 512
"""Bytes of a tar block. Headers are one block; data is padded to whole blocks."""
MAX_EXTENDED_HEADER = 2**20
"""Largest GNU or PAX extended header that is read, bytes."""
MAX_MEMBERS = 5_000_000
"""Most members of an archive."""
MAX_SAMPLE_MEMBERS = 1_000
"""Most members of a sample."""

ReadRange: TypeAlias = Callable[[int, int], bytes]
"""Reads bytes [start, stop) of the archive, fewer where it ends earlier."""

_REFUSED_EXTENSIONS = {"pkl", "pickle", "pyd", "pt", "pth", "dill", "joblib"}
_EXTENDED = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, b"X"}
_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
_REFUSED_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_WITHOUT_DATA = {
    tarfile.DIRTYPE,
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
}
# The key is the path up to the first dot of its last part; the rest is the extension. Names without
# a key or an extension, hidden files among them, belong to no sample.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


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
    refused: str | None = None
    """Why its data must not be used, as for a link; None where it may be."""


@dataclass(slots=True, kw_only=True)
class Sample:
    """Consecutive members that share a key. A repeated extension starts the next sample."""

    key: str
    """Path of its members up to the first dot of the last part."""
    start: int
    """Byte where its first member starts."""
    stop: int
    """Byte after its last member."""
    members: dict[str, Member] = field(default_factory=dict)
    """Its members by lower-case extension."""
    refused: str | None = None
    """Why the sample must not be used; None where it may be."""


def read_samples(
    read: ReadRange, start: int, stop: int, *, expect_end_mark: bool
) -> Iterator[Sample]:
    """Yields the samples whose members start in [start, stop), in order.

    expect_end_mark: `stop` is the archive's size, and an end mark must come before it. Raises
    ArchiveDamaged where the archive is damaged or truncated, after the last sample known to be
    complete.
    """
    current: Sample | None = None
    previous_extensions: frozenset[str] = frozenset()
    try:
        for member in read_members(read, start, stop, expect_end_mark=expect_end_mark):
            key, extension = _split_name(member.name)
            if not extension and member.refused is None:
                continue
            if current is None or current.key != key or extension in current.members:
                if current is not None:
                    yield current
                    previous_extensions = frozenset(current.members)
                current = Sample(key=key, start=member.start, stop=member.stop)
            current.stop = member.stop
            current.members[extension] = member
            current.refused = current.refused or _find_refusal(member, extension)
            if len(current.members) > MAX_SAMPLE_MEMBERS:
                raise ArchiveDamaged(
                    member.start, f"over {MAX_SAMPLE_MEMBERS} members in a sample", key
                )
    except ArchiveDamaged as damage:
        if current is not None and _is_complete(current, previous_extensions, damage):
            yield current
        raise
    if current is not None:
        yield current


def _is_complete(
    sample: Sample, previous_extensions: frozenset[str], damage: ArchiveDamaged
) -> bool:
    """Whether the damage after the sample took none of its members.

    The damaged member's name decides where it is known. Otherwise the sample must have every
    extension of the sample before it.
    """
    if damage.member is None:
        return bool(previous_extensions) and previous_extensions <= set(sample.members)
    key, extension = _split_name(damage.member)
    return key != sample.key or extension in sample.members


def _split_name(name: str) -> tuple[str, str]:
    """(key, lower-case extension) of a member; the extension is empty if it is in no sample."""
    match = _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")


def _find_refusal(member: Member, extension: str) -> str | None:
    reason = member.refused
    if extension.rpartition(".")[2] in _REFUSED_EXTENSIONS:
        reason = "a pickle could run code when read"
    return reason and f"refused member {member.name[:200]}: {reason}"


def read_members(
    read: ReadRange, start: int, stop: int, *, expect_end_mark: bool
) -> Iterator[Member]:
    """Yields every file, link and device that starts in [start, stop); directories are skipped.
    See `read_samples`."""
    position = start
    for _ in range(MAX_MEMBERS):
        if position >= stop and not expect_end_mark:
            return
        member_start = position
        extended: dict[str, str] = {}
        header = _read_header(read, position)
        while header is not None and (header.type in _EXTENDED or header.type == tarfile.XGLTYPE):
            extended |= _read_extended_header(read, position, header)
            position += BLOCK + _pad(header.size)
            header = _read_header(read, position)
        if header is None:
            return
        size = _parse_size(header, extended, position)
        data_start = position + BLOCK
        position = data_start + (_pad(size) if header.type not in _WITHOUT_DATA else 0)
        path = extended.get("path") or header.name
        name = _decode_name(path).removeprefix("./")
        if expect_end_mark and position > stop:
            raise ArchiveDamaged(member_start, f"{name[:200]} is truncated", name)
        if header.type == tarfile.DIRTYPE:
            continue
        yield Member(
            name=name,
            start=member_start,
            data_start=data_start,
            size=size,
            stop=position,
            refused=_refuse_type(header.type) or _refuse_path(path),
        )
    raise ArchiveDamaged(position, f"more than {MAX_MEMBERS:,} members")


def _read_header(read: ReadRange, position: int) -> tarfile.TarInfo | None:
    """The header block at `position`, or None at the archive's end mark."""
    block = read(position, position + BLOCK)
    if len(block) < BLOCK:
        raise ArchiveDamaged(position, "no end mark" if not block else "a header is truncated")
    if not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise ArchiveDamaged(position, "a header is corrupt") from error


def _read_extended_header(
    read: ReadRange, position: int, header: tarfile.TarInfo
) -> dict[str, str]:
    """Path and size of the next member, where a GNU or PAX extended header has them."""
    if not 0 <= header.size <= MAX_EXTENDED_HEADER:
        raise ArchiveDamaged(position, f"an extended header of {header.size:,} bytes")
    if header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        return {}
    body = read(position + BLOCK, position + BLOCK + header.size)
    if len(body) < header.size:
        raise ArchiveDamaged(position, "an extended header is truncated")
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": body.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    records: dict[str, str] = {}
    while body.strip(b"\0"):
        length, _, _ = body.partition(b" ")
        if not length.isdigit() or len(length) > 7 or not 5 <= int(length) <= len(body):
            raise ArchiveDamaged(position, "an extended header is corrupt")
        record = body[len(length) + 1 : int(length) - 1]
        name, _, value = record.partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        body = body[int(length) :]
    return {name: records[name] for name in ("path", "size") if name in records}


def _parse_size(header: tarfile.TarInfo, extended: dict[str, str], position: int) -> int:
    text = extended.get("size", str(header.size))
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ArchiveDamaged(position, f"a member size of {text[:40]!r}")
    return int(text)


def _pad(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _decode_name(name: str) -> str:
    """The name as valid Unicode; bytes that are not UTF-8 become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _refuse_type(kind: bytes) -> str | None:
    return None if kind in _REGULAR else _REFUSED_TYPES.get(kind, f"a member of type {kind!r}")


def _refuse_path(name: str) -> str | None:
    if name.startswith("/") or ".." in name.split("/"):
        return "its path leads outside the archive"
    return None
