"""Samples of a WebDataset tar: consecutive members with one key, and the damage between them.

Guarantees: damage never joins two samples nor passes half of one as whole. A sample beside damage
is whole only if that is known; otherwise its bytes belong to the damage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from cluster.corpus.tar import Damage, Padding, walk_archive, walk_members
from cluster.corpus.tar_header import Member, ReadRange

MAX_SAMPLE_MEMBERS = 1_000
"""Most members of a sample; the next one starts another sample."""
_MAX_REASON = 300

# The key is the path up to the first dot of its last part; the rest is the extension. Names without
# a key or an extension, hidden files among them, belong to no sample.
_FIRST_DOT = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_LAST_DOT = re.compile(r"((?:.*/)?[^./][^/]*)\.([^./]+)", re.DOTALL)


_Piece: TypeAlias = "Sample | Padding | Damage"


@dataclass(slots=True, kw_only=True)
class Sample:
    """Consecutive members that share a key. A repeated extension starts the next sample."""

    key: str
    """Path of its members up to the first dot of the last part, or the last one of it."""
    start: int
    """Byte where its first member starts."""
    stop: int
    """Byte after its last member."""
    members: dict[str, Member] = field(default_factory=dict)
    """Its members by lower-case extension."""
    refused: str | None = None
    """Why the sample must not be used; None where it may be."""


def read_rows(
    read: ReadRange,
    size: int,
    *,
    dotted_keys: bool = False,
    on_nameless: Callable[[Member], None] = lambda member: None,
) -> Iterator[Sample | Damage]:
    """The rows of a whole archive of `size` bytes: its samples, and one for each damaged range.

    dotted_keys: keys end at the last dot of the file name. on_nameless: called with each member
    that is in no sample, because its name has no key or no extension.
    """
    pieces = _group_members(walk_archive(read, size), dotted_keys, on_nameless)
    return _merge_damage(_take_incomplete(pieces, dotted_keys=dotted_keys))


def read_samples(
    read: ReadRange, start: int, stop: int, *, dotted_keys: bool = False
) -> Iterator[Sample]:
    """The samples in bytes [start, stop) of an archive, which `read_rows` found without damage.
    Raises ArchiveDamaged where there is some nevertheless."""
    pieces = _group_members(walk_members(read, start, stop), dotted_keys)
    return (piece for piece in pieces if isinstance(piece, Sample))


def split_name(name: str, *, dotted_keys: bool = False) -> tuple[str, str]:
    """(key, lower-case extension) of a member; the extension is empty if it is in no sample."""
    match = (_LAST_DOT if dotted_keys else _FIRST_DOT).fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")


def _group_members(
    pieces: Iterable[Member | Padding | Damage],
    dotted_keys: bool,
    on_nameless: Callable[[Member], None] = lambda member: None,
) -> Iterator[_Piece]:
    current: Sample | None = None
    for piece in pieces:
        if not isinstance(piece, Member):
            if current is not None:
                yield current
            current = None
            yield piece
            continue
        key, extension = split_name(piece.name, dotted_keys=dotted_keys)
        if not piece.is_file:
            continue
        if not extension:
            on_nameless(piece)
            continue
        if (
            current is None
            or current.key != key
            or extension in current.members
            or len(current.members) >= MAX_SAMPLE_MEMBERS
        ):
            if current is not None:
                yield current
            current = Sample(key=key, start=piece.start, stop=piece.stop)
        current.stop = piece.stop
        current.members[extension] = piece
        if piece.refused is not None and current.refused is None:
            current.refused = f"refused member {piece.name[:200]}: {piece.refused}"
    if current is not None:
        yield current


def _take_incomplete(pieces: Iterable[_Piece], *, dotted_keys: bool) -> Iterator[_Piece]:
    """The pieces, with the samples beside damage that are not known to be whole as damage.

    The damaged member's name decides where it is known. Otherwise a sample must have every
    extension of the last sample away from damage, or of the next one where there is none before.
    """
    whole: frozenset[str] = frozenset()
    waiting: list[_Piece] = []
    for before, piece, after in _with_neighbours(pieces):
        if not isinstance(piece, Sample):
            if waiting:
                waiting.append(piece)
            else:
                yield piece
            continue
        lost = after.member if isinstance(after, Damage) else None
        if lost is not None and not split_name(lost, dotted_keys=dotted_keys)[1]:
            lost = None  # it is in no sample, and more members of this one may be behind it
        ends_whole = lost is not None or not isinstance(after, Damage)
        if lost is not None and _belongs_to(lost, piece, dotted_keys=dotted_keys):
            piece = _as_damage(piece)
        elif ends_whole and not isinstance(before, Damage):
            whole = frozenset(piece.members)
            yield from (_settle(item, whole) for item in waiting)
            waiting.clear()
        elif whole:
            piece = _settle(piece, whole)
        if whole:
            yield piece
        else:
            waiting.append(piece)
    yield from (_settle(item, whole) for item in waiting)


def _settle(piece: _Piece, whole: frozenset[str]) -> _Piece:
    if not isinstance(piece, Sample) or (whole and whole <= piece.members.keys()):
        return piece
    return _as_damage(piece)


def _as_damage(sample: Sample) -> Damage:
    reason = f"sample {sample.key[:100]} may have lost members"
    return Damage(start=sample.start, stop=sample.stop, reason=reason)


def _belongs_to(name: str, sample: Sample, *, dotted_keys: bool) -> bool:
    key, extension = split_name(name, dotted_keys=dotted_keys)
    return key == sample.key and extension not in sample.members


def _with_neighbours(
    pieces: Iterable[_Piece],
) -> Iterator[tuple[_Piece | None, _Piece, _Piece | None]]:
    before = current = None
    for after in pieces:
        if current is not None:
            yield before, current, after
        before, current = current, after
    if current is not None:
        yield before, current, None


def _merge_damage(pieces: Iterable[_Piece]) -> Iterator[Sample | Damage]:
    """The rows; damage with no whole sample and no padding in between is one row."""
    pending: Damage | None = None
    for piece in pieces:
        if isinstance(piece, Damage):
            if pending is not None:
                reason = f"{pending.reason}; {piece.reason}"[:_MAX_REASON]
                piece = replace(piece, start=pending.start, reason=reason)
            pending = piece
            continue
        if pending is not None:
            yield pending
            pending = None
        if isinstance(piece, Sample):
            yield piece
    if pending is not None:
        yield pending
