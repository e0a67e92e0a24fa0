"""The walk over damaged tars: every byte is a sample, padding or reported damage, and whole samples
away from the damage are always found."""

from __future__ import annotations

import tarfile
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster.corpus.source import read_unit
from cluster.corpus.tar import RECORD, Damage, Padding, walk_archive
from cluster.corpus.tar_header import BLOCK, Member, parse_pax
from cluster.corpus.tar_index import PACKED, index_tar
from cluster.corpus.tar_samples import Sample, read_rows
from cluster.corpus.unit import FileIndex
from cluster.corpus.webdataset import map_tar_columns
from cluster.store import Store, open_store
from tests.cluster.corpora import TAR_NOTES, tar_bytes


@pytest.fixture
def corpus(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "in"))


def samples(names: str, size: int = 700) -> list[tuple[str, bytes]]:
    """Two members for each letter, of two blocks and one."""
    return [
        member
        for name in names
        for member in ((f"{name}.jpg", name.encode() * size), (f"{name}.txt", name.encode()))
    ]


SAMPLE = (3 + 2) * BLOCK
"""Bytes of one of `samples`."""


def walk(data: bytes) -> list[Member | Padding | Damage]:
    pieces = list(walk_archive(lambda start, stop: data[start:stop], len(data)))
    edges = [0, *(piece.stop for piece in pieces)]
    assert [piece.start for piece in pieces] == edges[:-1]
    assert edges[-1] == len(data)
    return pieces


def rows(data: bytes) -> list[str]:
    """Keys of the samples in order, and `start-stop` of damaged ranges."""
    found = read_rows(lambda start, stop: data[start:stop], len(data))
    return [
        row.key if isinstance(row, Sample) else f"{row.start // BLOCK}-{row.stop // BLOCK}"
        for row in found
    ]


def zeroed(data: bytes, start: int, stop: int) -> bytes:
    return data[:start] + bytes(stop - start) + data[stop:]


def test_a_zeroed_header_costs_its_sample_and_no_other() -> None:
    data = tar_bytes(samples("abcde"))
    assert rows(zeroed(data, 2 * SAMPLE, 2 * SAMPLE + BLOCK)) == ["a", "b", "10-15", "d", "e"]
    second = 2 * SAMPLE + 3 * BLOCK
    assert rows(zeroed(data, second, second + BLOCK)) == ["a", "b", "10-15", "d", "e"]


def test_a_flipped_bit_in_a_header_costs_its_sample_and_no_other() -> None:
    data = bytearray(tar_bytes(samples("abcde")))
    data[2 * SAMPLE + 130] ^= 1  # in the size of the member
    assert rows(bytes(data)) == ["a", "b", "10-15", "d", "e"]


def test_a_hole_of_zeros_costs_what_lies_in_it() -> None:
    data = tar_bytes(samples("abcdefghijklmnopqrstuvwxyz"))
    hole = zeroed(data, 3 * SAMPLE, 16 * SAMPLE + BLOCK)
    assert rows(hole) == [*"abc", f"15-{17 * 5}", *"rstuvwxyz"]


def test_the_row_of_damage_begins_and_ends_with_the_half_samples_beside_it() -> None:
    data = tar_bytes(samples("abcde"))
    damaged = zeroed(data, SAMPLE + 3 * BLOCK, 2 * SAMPLE + BLOCK)  # b.txt and the start of c.jpg
    assert rows(damaged) == ["a", "5-15", "d", "e"]


def test_the_first_sample_may_be_damaged_too() -> None:
    assert rows(zeroed(tar_bytes(samples("abc")), 0, BLOCK)) == ["0-5", "b", "c"]


@pytest.mark.parametrize("second", [tar_bytes(samples("cd")), tar_bytes([]), bytes(RECORD)])
def test_archives_behind_each_other_are_one(second: bytes) -> None:
    data = tar_bytes(samples("ab")) + second
    assert rows(data) == ["a", "b", *("cd" if len(second.strip(b"\0")) else "")]


def test_archives_with_a_bare_end_mark_behind_each_other_are_one() -> None:
    bare = tar_bytes(samples("ab"))[: 2 * SAMPLE + 2 * BLOCK]
    assert rows(bare + tar_bytes(samples("cd"))) == ["a", "b", "c", "d"]


def test_samples_of_one_key_at_the_seam_of_two_archives_are_two() -> None:
    assert rows(tar_bytes([("a.jpg", b"1")]) + tar_bytes([("a.txt", b"2")])) == ["a", "a"]


def test_zeros_longer_than_any_end_mark_before_a_header_are_damage() -> None:
    data = tar_bytes(samples("ab"))[: 2 * SAMPLE] + bytes(3 * RECORD)
    seam = len(data) // BLOCK
    assert rows(data + tar_bytes(samples("cd"))) == ["a", "b", f"10-{seam}", "c", "d"]


def test_a_long_tail_of_zeros_is_an_unfinished_file() -> None:
    whole = tar_bytes(samples("ab"))
    assert rows(whole + bytes(2**20 - len(whole))) == ["a", "b"]
    assert rows(whole + bytes(2**21)) == ["a", "b", f"10-{(len(whole) + 2**21) // BLOCK}"]


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_missing_end_mark_is_a_row(blocks: int) -> None:
    data = tar_bytes(samples("ab"))[: 2 * SAMPLE + blocks * BLOCK]
    assert rows(data) == ["a", "b", f"10-{10 + blocks}"]


def test_inserted_bytes_of_any_number_cost_no_sample_behind_them() -> None:
    data = tar_bytes(samples("abcd"))
    assert rows(data[: 2 * SAMPLE] + b"~" * 777 + data[2 * SAMPLE :])[:2] == ["a", "b"]
    assert rows(data[: 2 * SAMPLE] + b"~" * 777 + data[2 * SAMPLE :])[3:] == ["c", "d"]


def test_headers_of_the_oldest_format_are_found_behind_damage() -> None:
    data = bytearray(tar_bytes(samples("abcd"), format=tarfile.USTAR_FORMAT))
    for start in range(0, 4 * SAMPLE, BLOCK):
        block = data[start : start + BLOCK]
        if block[257:262] == b"ustar":
            block[257:265] = bytes(8)
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            data[start : start + BLOCK] = block
    assert rows(bytes(data)) == ["a", "b", "c", "d"]
    assert rows(zeroed(bytes(data), SAMPLE, SAMPLE + BLOCK)) == ["a", "5-10", "c", "d"]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_member_that_lost_its_long_name_is_none_of_another_name(format: int, block: int) -> None:
    names = ["d/" * 80 + name for name in "abcde"]
    data = tar_bytes([(f"{name}.jpg", b"x") for name in names], format=format)
    start = data.index(names[2].encode()) // BLOCK * BLOCK - BLOCK
    found = rows(zeroed(data, start + block * BLOCK, start + (block + 1) * BLOCK))
    assert [row for row in found if "/" in row] == [*names[:2], *names[3:]]
    assert len(found) == 5


def test_pax_records_are_parsed_in_linear_time() -> None:
    record = b"9 a=bcde\n"
    assert parse_pax(record * 100_000 + b"15 path=x/y.jpg"[:14] + b"\n") is not None
    assert parse_pax(b"11 path=ab\n") == {b"path": b"ab"}
    for wrong in (b"12 path=ab\n", b"x", b"99 path=ab\n", b"0 a=b\n", b" a=b\n"):
        assert parse_pax(wrong) is None


# The law, with generated archives and generated damage.

FORMATS = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]
UNIT: dict[str, Any] = {"unit_rows": 3, "unit_bytes": 6_000}


@st.composite
def archives(draw: st.DrawFn) -> tuple[bytes, list[tuple[str, int, int, bytes]]]:
    """An archive, and key, bytes [start, stop) and image of each sample."""
    format = draw(st.sampled_from(FORMATS))
    folder = draw(st.sampled_from(["", "d/" * 30, "é/", "k" * 30 + "/" + "l" * 150 + "/"]))
    folder = folder if format != tarfile.USTAR_FORMAT else "d/"
    extensions = draw(st.sampled_from([("jpg",), ("jpg", "txt"), ("json", "png", "txt")]))
    members = []
    for number in range(draw(st.integers(1, 8))):
        # Keys of one length, in which no flipped bit makes another key.
        key = f"{folder}{number * 0x111111:08x}"
        for extension in extensions:
            size = draw(st.sampled_from([0, 1, 511, 512, 513, 1_024, 3_000]))
            content = (f"{key}.{extension}".encode()[-60:] * 120)[:size]
            members.append((f"{key}.{extension}", content))
    data = tar_bytes(members, format=format)
    notes = draw(st.lists(st.sampled_from([b"", *TAR_NOTES]), max_size=8))
    edges = [0, *(piece.stop for piece in walk(data) if isinstance(piece, Member))]
    parts = [data[start:stop] for start, stop in pairwise(edges)]
    data = b"".join(note + part for note, part in zip_longest(notes, parts, fillvalue=b""))
    data += bytes(2 * BLOCK + -(len(data) + 2 * BLOCK) % RECORD)
    spans: dict[str, tuple[int, int]] = {}
    for piece in walk(data):
        if isinstance(piece, Member) and piece.is_file and piece.name.endswith(extensions):
            key = piece.name.rpartition(".")[0]
            start, _ = spans.get(key, (piece.start, 0))
            spans[key] = (start, piece.stop)
    images = {n.rpartition(".")[0]: d for n, d in members if n.endswith(("jpg", "png"))}
    return data, [(key, start, stop, images[key]) for key, (start, stop) in spans.items()]


@st.composite
def damages(draw: st.DrawFn, data: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """Damaged data, and the ranges of the original that are no longer as they were; an insertion
    is the empty range where it stands."""
    kind = draw(st.sampled_from(["zeros", "bits", "cut", "garbage", "again", "noise"]))
    start = draw(st.integers(0, len(data) - 1))
    length = draw(st.sampled_from([1, 100, BLOCK, 2 * BLOCK, 5_000, len(data)]))
    if draw(st.booleans()):
        start = start // BLOCK * BLOCK
    stop = min(len(data), start + length)
    if kind == "zeros":
        return zeroed(data, start, stop), [(start, stop)]
    if kind == "noise":
        noise = bytes((7 * n) % 251 + 1 for n in range(stop - start))
        return data[:start] + noise + data[stop:], [(start, stop)]
    if kind == "bits":
        flipped = bytearray(data)
        places = draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=3))
        for place in places:
            flipped[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(flipped), [(place, place + 1) for place in places]
    if kind == "cut":
        return data[:start], [(start, len(data))]
    if kind == "garbage":
        return data[:start] + b"\1" * length + data[start:], [(start, start)]
    again = data[start // BLOCK * BLOCK : stop // BLOCK * BLOCK]
    place = draw(st.integers(0, len(data) // BLOCK)) * BLOCK
    # A header without its data takes what follows it for its data.
    return data[:place] + again + data[place:], [(place, place + 4_096)]


def is_whole(span: tuple[int, int], damaged: list[tuple[int, int]]) -> bool:
    start, stop = span
    return not any(
        (first < stop and last > start) or (start < first < stop) for first, last in damaged
    )


def read_back(store: Store, index: FileIndex) -> list[dict[str, object]]:
    """The rows of all units, as they are read."""
    mapping = map_tar_columns(store, [index], kind="caption", prompt="p")
    found = []
    for unit in index.units:
        table = read_unit(store, unit, mapping)
        assert len(table) == unit.row_count
        found += table.to_pylist()
    return found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_rows_are_as_planned_and_whole_samples_are_labelled_whatever_the_damage(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw, spans = data.draw(archives())
    damaged, ranges = data.draw(damages(raw))
    if data.draw(st.booleans()):
        damaged += tar_bytes([("other/z.jpg", b"z"), ("other/z.txt", b"z"), ("y.json", b"z")])
    walk(damaged)
    store = open_store(str(tmp_path_factory.mktemp("law")))
    store.put("a.tar", damaged)
    (info,) = store.list()
    index = index_tar(store, info, **UNIT)
    found = read_back(store, index)
    assert len(found) == index.rows

    codes = {row["_in_error_code"] for row in found}
    assert codes <= {None, "archive_truncated", "image_missing", "read_failed"}
    labelled = [(row["_in_key"], row["_in_image"]) for row in found if not row["_in_error_code"]]
    whole = [span for span in spans if is_whole(span[1:3], ranges)]
    # With fewer nothing tells how many members a sample beside the damage must have.
    if len(whole) > 2:
        assert {(key, image) for key, _, _, image in whole} <= set(labelled)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(raw=st.binary(max_size=3_000), blocks=st.lists(st.integers(0, 40), max_size=8))
def test_any_bytes_are_covered_and_read_as_planned(
    raw: bytes, blocks: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    archive = tar_bytes(samples("abcdefgh"))
    pieces = [archive[block * BLOCK : (block + 1) * BLOCK] for block in blocks]
    data = raw + b"".join(pieces)
    assume(not data.startswith(tuple(PACKED)))
    walk(data)
    store = open_store(str(tmp_path_factory.mktemp("any")))
    store.put("a.tar", data)
    (info,) = store.list()
    index = index_tar(store, info, **UNIT)
    assert len(read_back(store, index)) == index.rows
