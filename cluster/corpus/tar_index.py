"""The index of one tar: its units as byte ranges, its extensions, and what of it cannot be read.

Guarantees: every whole sample is a row and every damaged range is one more, whatever the bytes;
members are not fetched, only their headers where that saves bytes. An archive whose samples the
key rule would confuse is a UsageError that states the rule.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cluster.corpus.git_lfs import check_not_pointer
from cluster.corpus.header_windows import HeaderWindows
from cluster.corpus.member_roles import find_rival_images
from cluster.corpus.tar import Damage
from cluster.corpus.tar_header import BLOCK, Member, parse_header
from cluster.corpus.tar_samples import MAX_SAMPLE_MEMBERS, Sample, read_rows
from cluster.corpus.unit import FileIndex, Unit, make_unit
from cluster.errors import TooManyMembers, UsageError
from cluster.store import ObjectInfo, Store

_REPACK = "&& tar --sort=name -C files -cf plain.tar ."
PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip -c {} > plain.tar"),
    b"BZh": ("bzip2", "bunzip2 -c {} > plain.tar"),
    b"\xfd7zXZ\0": ("xz", "xz -dc {} > plain.tar"),
    b"]\0\0": ("lzma", "xz -dc {} > plain.tar"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc {} > plain.tar"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dc {} > plain.tar"),
    b"\x02\x21\x4c\x18": ("lz4", "lz4 -dc {} > plain.tar"),
    b"LZIP": ("lzip", "lzip -dc {} > plain.tar"),
    b"\x89LZO": ("lzop", "lzop -dc {} > plain.tar"),
    b"\x1f\x9d": ("compress", "uncompress -c {} > plain.tar"),
    b"PK\3\4": ("zip", f"unzip -q {{}} -d files {_REPACK}"),
    b"PK\5\6": ("zip", f"unzip -q {{}} -d files {_REPACK}"),
    b"PK\7\x08": ("zip", f"unzip -q {{}} -d files {_REPACK}"),
    b"7z\xbc\xaf\x27\x1c": ("7z", f"7z x -ofiles {{}} {_REPACK}"),
    b"Rar!\x1a\7": ("rar", f"unrar x {{}} files/ {_REPACK}"),
}
"""How files of other formats begin, the format, and the command that makes a plain tar of one."""
# Above this share of samples whose key comes back the members are unsorted; a few that do are
# strays, which are rows of their own.
_UNSORTED_SHARE = 0.01
_UNSORTED_KEYS = 2


def index_tar(
    store: Store, info: ObjectInfo, *, unit_rows: int, unit_bytes: int, dotted_keys: bool = False
) -> FileIndex:
    """Indexes one tar from its headers: its extensions, and its units of up to `unit_rows` rows and
    `unit_bytes` readable bytes. Raises UsageError for a compressed file or an archive of
    another format, a pointer of Git LFS,
    unsorted members, keys with dots, members of which none has a key and an extension, and too many
    of them; StoreError where the store gave up.

    dotted_keys: keys end at the last dot of the file name.
    """
    uri = store.uri_of(info.key)
    windows = HeaderWindows(store, info)
    beginning = windows.read(0, BLOCK)
    check_not_pointer(beginning, uri)
    _check_not_packed(beginning, uri)
    ranges: list[_UnitRange] = []
    extensions: set[str] = set()
    keys = _KeyOrder()
    nameless: list[str] = []

    def note_nameless(member: Member) -> None:
        if not member.name.rpartition("/")[2].startswith("."):
            nameless.append(member.name if not nameless else "")

    rows = read_rows(windows.read, info.size, dotted_keys=dotted_keys, on_nameless=note_nameless)
    try:
        for row in rows:
            if isinstance(row, Sample):
                extensions.update(row.members)
                _check_key_rule(row, uri)
                keys.add(row)
            if not ranges or ranges[-1].is_full(row, unit_rows, unit_bytes):
                ranges.append(_UnitRange(start=row.start, stop=row.start))
            ranges[-1].add(row)
    except TooManyMembers as error:
        raise UsageError(f"{uri}: {error}") from error
    if nameless and not ranges:
        raise UsageError(
            f"{uri}: no member is named KEY.EXTENSION (first: {nameless[0][:100]}), so it holds no "
            "sample; name them as in 000123.jpg, or keep the file out of --input"
        )
    keys.check(uri)
    warnings = keys.describe_strays()
    if nameless:
        warnings.append(
            f"{len(nameless)} members are in no sample, because their names have no key or no "
            f"extension (first: {nameless[0][:100]})"
        )
    units = tuple(_make_units(info, ranges))
    return FileIndex(
        info=info,
        units=units,
        schema=pa.schema([pa.field(name, pa.binary()) for name in sorted(extensions)]),
        warnings=tuple(warnings),
    )


@dataclass(slots=True, kw_only=True)
class _UnitRange:
    """The rows of one unit."""

    start: int
    stop: int
    rows: int = 0
    damaged: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def unread_bytes(self) -> int:
        return sum(stop - start for start, stop, _ in self.damaged)

    def is_full(self, row: Sample | Damage, unit_rows: int, unit_bytes: int) -> bool:
        unread = self.unread_bytes + (row.stop - row.start if isinstance(row, Damage) else 0)
        return self.rows >= unit_rows or row.stop - self.start - unread > unit_bytes

    def add(self, row: Sample | Damage) -> None:
        self.rows += 1
        self.stop = row.stop
        if isinstance(row, Damage):
            self.damaged.append((row.start, row.stop, row.reason))


def _make_units(info: ObjectInfo, ranges: list[_UnitRange]) -> Iterator[Unit]:
    first = 0
    for unit_range in ranges:
        position: dict[str, Any] = {
            "row_start": first,
            "row_count": unit_range.rows,
            "size_bytes": unit_range.stop - unit_range.start - unit_range.unread_bytes,
            "byte_start": unit_range.start,
            "byte_stop": unit_range.stop,
        }
        if unit_range.damaged:
            position["damaged"] = unit_range.damaged
        yield make_unit("webdataset", info, **position)
        first += unit_range.rows


class _KeyOrder:
    """Keys that come back with other extensions than before: parts of samples that lie apart."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, frozenset[str]]] = {}
        self._back: dict[str, tuple[int, int]] = {}

    def add(self, sample: Sample) -> None:
        extensions = frozenset(sample.members)
        start, before = self._seen.get(sample.key, (sample.start, frozenset()))
        if before and not before & extensions:
            self._back.setdefault(sample.key, (start, sample.start))
        self._seen[sample.key] = (start, before | extensions)

    def check(self, uri: str) -> None:
        """Raises UsageError if members are not sorted by key."""
        if len(self._back) < max(_UNSORTED_KEYS, _UNSORTED_SHARE * len(self._seen)):
            return
        key, (first, again) = next(iter(self._back.items()))
        raise UsageError(
            f"{uri}: members of a sample must follow each other, but {key[:100]} is at byte "
            f"{first:,} and, with other members, at byte {again:,} ({len(self._back)} keys in all "
            "come back); pack the files again in the order of their names: tar --sort=name -cf …"
        )

    def describe_strays(self) -> list[str]:
        return [
            f"{key[:100]} at byte {first:,} comes back with other members at byte {again:,}; "
            "these are rows of their own"
            for key, (first, again) in self._back.items()
        ]


def _check_not_packed(block: bytes, uri: str) -> None:
    if parse_header(block) is not None:
        return
    for magic, (name, command) in PACKED.items():
        if block.startswith(magic):
            raise UsageError(
                f"{uri}: this is {name}, not a plain tar, and cannot be read in parts; unpack it "
                f"first: {command.format(shlex.quote(uri.rpartition('/')[2]))}"
            )


def _check_key_rule(sample: Sample, uri: str) -> None:
    """Raises UsageError for a sample that looks like many whose keys have dots."""
    images = find_rival_images(sample.members)
    if not images and len(sample.members) < MAX_SAMPLE_MEMBERS:
        return
    shown = ", ".join((images or list(sample.members))[:3])
    raise UsageError(
        f"{uri}: sample {sample.key[:100]} has {len(images) or 'over'} "
        f"{'images' if images else f'{MAX_SAMPLE_MEMBERS:,} members'} ({shown}, …) and none is "
        "known to be the one to label: a key ends at the first dot of the file name. If your keys "
        "have dots, use --dotted-keys: then they end at the last one. If a sample has several "
        "images, pack the one to label as <key>.jpg or <key>.png"
    )
