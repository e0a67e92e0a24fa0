"""Tar archives as a stream of samples, for archives nobody vouches for.

Nothing is extracted, no link or device is followed, and damage is told apart from a regular end:
Python's `tarfile` takes a header cut short for the end of the archive.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from cluster.errors import ArchiveDamaged

BLOCK = 512
MAX_EXTENDED_HEADER = 2**20
MAX_MEMBERS = 5_000_000
MAX_SAMPLE_MEMBERS = 1_000

# Reads bytes [start, stop) of the archive, fewer where it ends earlier.
ReadRange: TypeAlias = Callable[[int, int], bytes]

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
# The path up to the first dot of its last part, then the extension. Names without either, hidden
# ones among them, belong to no sample.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One entry: bytes [start, stop) hold its headers and data, the data from `data` on."""

    name: str
    start: int
    data: int
    size: int
    stop: int
    refused: str | None = None


@dataclass(slots=True, kw_only=True)
class Sample:
    """Consecutive members that share a key; a repeated extension begins another sample."""

    key: str
    start: int
    stop: int
    members: dict[str, Member] = field(default_factory=dict)
    refused: str | None = None


def samples(read: ReadRange, start: int, stop: int, *, ends: bool) -> Iterator[Sample]:
    """The samples whose members begin in [start, stop), in order.

    With `ends`, `stop` is the archive's size and an end mark must come before it. Raises
    ArchiveDamaged where the archive breaks off, after the last sample known to be whole.
    """
    current: Sample | None = None
    usual: frozenset[str] = frozenset()  # the extensions of the sample before
    try:
        for member in members(read, start, stop, ends=ends):
            key, extension = _split(member.name)
            if not extension and member.refused is None:
                continue
            if current is None or current.key != key or extension in current.members:
                if current is not None:
                    yield current
                    usual = frozenset(current.members)
                current = Sample(key=key, start=member.start, stop=member.stop)
            current.stop = member.stop
            current.members[extension] = member
            current.refused = current.refused or _refusal(member, extension)
            if len(current.members) > MAX_SAMPLE_MEMBERS:
                raise ArchiveDamaged(
                    member.start, f"over {MAX_SAMPLE_MEMBERS} members in a sample", key
                )
    except ArchiveDamaged as damage:
        if current is not None and _is_whole(current, usual, damage):
            yield current
        raise
    if current is not None:
        yield current


def _is_whole(sample: Sample, usual: frozenset[str], damage: ArchiveDamaged) -> bool:
    """Whether nothing of the sample was lost in the damage that follows it.

    If the lost member has a name, its key tells; if not, the sample must have what the one
    before it had.
    """
    if damage.member is None:
        return bool(usual) and usual <= set(sample.members)
    key, extension = _split(damage.member)
    return key != sample.key or extension in sample.members


def _split(name: str) -> tuple[str, str]:
    """(key, lower-case extension) of a member; no extension where it belongs to no sample."""
    match = _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")


def _refusal(member: Member, extension: str) -> str | None:
    reason = member.refused
    if extension.rpartition(".")[2] in _REFUSED_EXTENSIONS:
        reason = "a pickle could run code when read"
    return reason and f"refused member {member.name[:200]}: {reason}"


def members(read: ReadRange, start: int, stop: int, *, ends: bool) -> Iterator[Member]:
    """Every file, link and device that begins in [start, stop); directories are left out."""
    position = start
    for _ in range(MAX_MEMBERS):
        if position >= stop and not ends:
            return
        began = position
        extended: dict[str, str] = {}
        header = _header(read, position)
        while header is not None and (header.type in _EXTENDED or header.type == tarfile.XGLTYPE):
            extended |= _extended(read, position, header)
            position += BLOCK + _padded(header.size)
            header = _header(read, position)
        if header is None:
            return
        size = _size(header, extended, position)
        data = position + BLOCK
        position = data + (_padded(size) if header.type not in _WITHOUT_DATA else 0)
        path = extended.get("path") or header.name
        name = _clean(path).removeprefix("./")
        if ends and position > stop:
            raise ArchiveDamaged(began, f"{name[:200]} is cut short", name)
        if header.type == tarfile.DIRTYPE:
            continue
        yield Member(
            name=name,
            start=began,
            data=data,
            size=size,
            stop=position,
            refused=_foreign_type(header.type) or _outside(path),
        )
    raise ArchiveDamaged(position, f"more than {MAX_MEMBERS:,} members")


def _header(read: ReadRange, position: int) -> tarfile.TarInfo | None:
    """The header block at `position`, or None at the archive's end mark."""
    block = read(position, position + BLOCK)
    if len(block) < BLOCK:
        raise ArchiveDamaged(position, "no end mark" if not block else "a header is cut short")
    if not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise ArchiveDamaged(position, "a header is corrupt") from error


def _extended(read: ReadRange, position: int, header: tarfile.TarInfo) -> dict[str, str]:
    """What a GNU or PAX extension header says of the next member: its path and size, if any."""
    if not 0 <= header.size <= MAX_EXTENDED_HEADER:
        raise ArchiveDamaged(position, f"an extended header of {header.size:,} bytes")
    if header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        return {}
    body = read(position + BLOCK, position + BLOCK + header.size)
    if len(body) < header.size:
        raise ArchiveDamaged(position, "an extended header is cut short")
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


def _size(header: tarfile.TarInfo, extended: dict[str, str], position: int) -> int:
    text = extended.get("size", str(header.size))
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ArchiveDamaged(position, f"a member size of {text[:40]!r}")
    return int(text)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _clean(name: str) -> str:
    """The name as proper Unicode, whatever bytes the archive holds."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _foreign_type(kind: bytes) -> str | None:
    return None if kind in _REGULAR else _REFUSED_TYPES.get(kind, f"a member of type {kind!r}")


def _outside(name: str) -> str | None:
    if name.startswith("/") or ".." in name.split("/"):
        return "its path leads outside the archive"
    return None
