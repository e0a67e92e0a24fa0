"""One member of a tar by its headers: what GNU tar writes beside plain files, from its own archives
where it is installed and from headers made by hand."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.corpus.tar import Damage, Padding, walk_archive
from cluster.corpus.tar_header import BLOCK, MAX_EXTENDED_HEADER, Member
from cluster.corpus.tar_samples import Sample, read_rows, read_samples
from tests.cluster.corpora import TAR_NOTES, tar_entry

END = bytes(2 * BLOCK)
SPARSE = "a sparse file; pack again without tar --sparse"


def rows(data: bytes) -> list[tuple[str, list[str], str | None]]:
    """Key, extensions and refusal of each sample; there is no damage."""
    found = list(read_rows(lambda start, stop: data[start:stop], len(data)))
    assert all(isinstance(row, Sample) for row in found), found
    return [(r.key, list(r.members), r.refused) for r in found if isinstance(r, Sample)]


def refused(key: str, *extensions: str) -> tuple[str, list[str], str]:
    return key, list(extensions), f"refused member {key}.{extensions[0]}: {SPARSE}"


NAMES = st.sampled_from(["a", "d/a", "каталог/日本", "d/" * 90 + "a"])


@given(
    name=NAMES,
    version=st.sampled_from(["0.0", "0.1", "1.0"]),
    data=st.binary(max_size=1_500),
    size=st.integers(0, 2**40),
)
def test_sparse_members_of_the_pax_formats_are_refused_by_their_real_name(
    name: str, version: str, data: bytes, size: int
) -> None:
    """Their data lacks the zeros of the file: it is no image."""
    real, folder = f"{name}.jpg", f"{name.rpartition('/')[0] or '.'}/GNUSparseFile.123/"
    stored = folder + real.rpartition("/")[2]
    records = {
        "0.0": {"GNU.sparse.size": f"{size}", "GNU.sparse.numblocks": "0"},
        "0.1": {"GNU.sparse.name": real, "GNU.sparse.size": f"{size}", "GNU.sparse.map": "0,0"},
        "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": real,
                "GNU.sparse.realsize": f"{size}"},
    }[version]  # fmt: skip
    sparse = tar_entry(real if version == "0.0" else stored, data, records=records)
    archive = (
        tar_entry("0.jpg", b"0") + sparse + tar_entry(f"{name}.txt", b"t", records={"comment": "x"})
    )
    assert rows(archive + tar_entry("z.jpg", b"z") + END) == [
        ("0", ["jpg"], None),
        refused(name, "jpg", "txt"),
        ("z", ["jpg"], None),
    ]


@given(blocks=st.integers(0, 30), data=st.binary(max_size=1_500))
def test_the_blocks_of_a_long_map_before_a_sparse_members_data_are_part_of_it(
    blocks: int, data: bytes
) -> None:
    """Its size does not count them."""
    full = b"00000000001\0" * 42 + b"\1" + bytes(7)
    between = (full * blocks)[: max(0, blocks * BLOCK - 8)] + bytes(8 if blocks else 0)
    sparse = tar_entry(
        "a.jpg", data, kind=tarfile.GNUTYPE_SPARSE, patch={482: bytes([blocks > 0])},
        between=between,
    )  # fmt: skip
    archive = (
        tar_entry("0.jpg", b"0")
        + sparse
        + tar_entry("a.txt", b"t")
        + tar_entry("z.jpg", b"z")
        + END
    )
    assert rows(archive) == [
        ("0", ["jpg"], None),
        refused("a", "jpg", "txt"),
        ("z", ["jpg"], None),
    ]
    members = [piece for piece in walk(archive) if isinstance(piece, Member)]
    start = members[1].data_start
    assert archive[start : start + members[1].size] == data


def walk(data: bytes) -> list[object]:
    return list(walk_archive(lambda start, stop: data[start:stop], len(data)))


def test_a_map_without_an_end_is_damage_that_ends_at_the_next_header() -> None:
    header = tar_entry("a.jpg", kind=tarfile.GNUTYPE_SPARSE, patch={482: b"\1"})
    archive = header + b"\1" * MAX_EXTENDED_HEADER + tar_entry("z.jpg", b"z") + END
    damage, *others = walk(archive)
    assert isinstance(damage, Damage)
    assert "the map of a sparse file has no end" in damage.reason
    assert damage.stop == BLOCK + MAX_EXTENDED_HEADER
    assert isinstance(others[0], Member)
    assert others[0].name == "z.jpg"
    assert any(isinstance(piece, Damage) for piece in walk(header + b"\1" * BLOCK))


@pytest.mark.parametrize("lost", [[0], [1], [0, 1]])
def test_a_sparse_member_that_lost_its_real_name_is_no_sample_of_another(lost: list[int]) -> None:
    records = {"GNU.sparse.name": "b.jpg", "GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    plain = [tar_entry(f"{name}.jpg", b"x") for name in "ac"]
    sparse = bytearray(tar_entry("./GNUSparseFile.7/b.jpg", b"x" * 600, records=records))
    for block in lost:
        sparse[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
    data = plain[0] * 2 + bytes(sparse) + plain[1] * 2 + END
    found = list(read_rows(lambda start, stop: data[start:stop], len(data)))
    used = [row.key for row in found if isinstance(row, Sample) and not row.refused]
    assert set(used) == {"a", "c"}
    assert len(found) == len(used) + 1


@given(name=st.sampled_from(["a", "d/a", "d/" * 30 + "a"]), times=st.binary(max_size=155))
def test_times_in_a_header_of_the_gnu_format_are_no_part_of_a_name(name: str, times: bytes) -> None:
    """An incremental dump has them where other formats have the beginning of a long name."""
    archive = tar_entry(f"{name}.jpg", b"a", patch={345: times}) + tar_entry("b.jpg", b"b") + END
    assert rows(archive) == [(name, ["jpg"], None), ("b", ["jpg"], None)]


@given(data=st.data(), keys=st.lists(st.sampled_from(["a", "d/b", "c"]), max_size=4))
def test_entries_that_are_in_no_sample_change_no_row_wherever_they_stand(
    data: st.DataObject, keys: list[str]
) -> None:
    """Labels, directories, notes of the archive, and what has no extension to be a sample's."""
    plain = [tar_entry(f"{key}.{e}", key.encode()) for key in keys for e in ("jpg", "txt")]
    plain += [tar_entry(f"{key}.jpg", kind=tarfile.SYMTYPE) for key in keys[:1]]
    noted = [
        part
        for member in [*plain, b""]
        for part in (*data.draw(st.lists(st.sampled_from(TAR_NOTES), max_size=2)), member)
    ]
    assert rows(b"".join(noted) + END) == rows(b"".join(plain) + END)
    archive = b"".join(noted)
    found = read_samples(lambda start, stop: archive[start:stop], 0, len(archive))
    contents = [
        [archive[m.data_start : m.data_start + m.size] for m in sample.members.values()]
        for sample in found
    ]
    assert contents == [[key.encode()] * 2 for key in keys] + [[b""]] * bool(keys)


def test_members_without_an_extension_are_told_of_whatever_they_are() -> None:
    archive = tar_entry("a.jpg", b"a") + b"".join(TAR_NOTES) + END
    nameless: list[str] = []
    list(
        read_rows(
            lambda start, stop: archive[start:stop],
            len(archive),
            on_nameless=lambda member: nameless.append(member.name),
        )
    )
    assert nameless == ["latest", "d/queue", "/dev/null", "README"]


@pytest.mark.parametrize("note", [note for note in TAR_NOTES if len(note) > BLOCK])
def test_a_sample_before_a_cut_entry_that_is_in_no_sample_is_not_known_to_be_whole(
    note: bytes,
) -> None:
    """More of its members may have been behind it."""
    whole = [tar_entry(f"{key}.{e}", b"x") for key in "ab" for e in ("jpg", "txt")]
    for members, expected in ((whole, "ab"), (whole[:3], "a")):
        archive = b"".join(members) + note[:BLOCK]
        found = list(read_rows(lambda start, stop, d=archive: d[start:stop], len(archive)))  # type: ignore[misc]
        assert [row.key for row in found if isinstance(row, Sample)] == list(expected)
        assert isinstance(found[-1], Damage)


def test_a_note_that_hides_half_of_an_archive_is_damage() -> None:
    """No note of an archive is a megabyte: what stands there are samples."""
    samples = tar_entry("a.jpg", bytes(MAX_EXTENDED_HEADER + 1)) + tar_entry("b.jpg", b"b")
    header = bytearray(tar_entry("pax_global_header", samples, kind=b"g"))
    found = [piece for piece in walk(bytes(header) + END) if not isinstance(piece, Padding)]
    assert [type(piece) for piece in found] == [Damage, Member, Member]


GNU_TAR = shutil.which("tar")
if GNU_TAR and b"GNU tar" not in subprocess.run([GNU_TAR, "--version"], capture_output=True).stdout:
    GNU_TAR = None


def packed(folder: Path, *options: str) -> bytes:
    """What GNU tar makes of a folder's samples."""
    names = sorted(path.name for path in folder.iterdir())
    command = [str(GNU_TAR), *options, "-cf", "-", "-C", str(folder), *names]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


@pytest.mark.skipif(GNU_TAR is None, reason="GNU tar is not installed")
@pytest.mark.parametrize("holes", [2, 60])
@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=pax", "--sparse-version=0.0"],
        ["--format=pax", "--sparse-version=0.1"],
        ["--format=pax", "--sparse-version=1.0"],
    ],
)
def test_sparse_files_that_gnu_tar_packs_are_refused_by_their_name(
    tmp_path: Path, options: list[str], holes: int
) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        for number in range(holes):
            file.seek(number * 2**17)
            file.write(b"x" * 4_096)
    (tmp_path / "a.txt").write_text("t")
    (tmp_path / "b.jpg").write_bytes(b"b")
    archive = packed(tmp_path, *options, "--sparse")
    if len(archive) > holes * 2**17:
        pytest.skip("the file system keeps no holes")
    assert rows(archive) == [refused("a", "jpg", "txt"), ("b", ["jpg"], None)]


@pytest.mark.skipif(GNU_TAR is None, reason="GNU tar is not installed")
@pytest.mark.parametrize("format", ["gnu", "pax"])
@pytest.mark.parametrize("dump", [False, True])
def test_labels_dumps_and_directories_of_gnu_tar_are_no_samples(
    tmp_path: Path, format: str, dump: bool
) -> None:
    (tmp_path / "in/d").mkdir(parents=True)
    (tmp_path / "in/latest").symlink_to("d/a.jpg")
    (tmp_path / "in/d/a.jpg").write_bytes(b"a")
    snapshot = [f"--listed-incremental={tmp_path}/snapshot"] if dump else []
    archive = packed(tmp_path / "in", f"--format={format}", "--label=week.7", *snapshot)
    assert rows(archive) == [("d/a", ["jpg"], None)]
