"""The WebDataset reader: samples of hostile tars, units as byte ranges, damage as one error row."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cluster.corpus.source import read_unit
from cluster.corpus.tar import Damage
from cluster.corpus.tar_header import BLOCK
from cluster.corpus.tar_index import PACKED, index_tar
from cluster.corpus.tar_samples import Sample, read_rows
from cluster.corpus.unit import make_unit
from cluster.errors import UsageError
from cluster.output.manifest import Manifest
from cluster.output.summary import summarise
from cluster.schema import input_schema
from cluster.store import Store, open_store
from tests.cluster.corpora import plan, read_all, tar_bytes


@pytest.fixture
def corpus(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "in"))


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def walk(data: bytes) -> tuple[list[Sample], list[Damage]]:
    """The samples and the damaged ranges of an archive."""
    rows = list(read_rows(lambda start, stop: data[start:stop], len(data)))
    samples = [row for row in rows if isinstance(row, Sample)]
    return samples, [row for row in rows if isinstance(row, Damage)]


def extensions_by_key(found: Iterable[Sample]) -> list[tuple[str, list[str]]]:
    return [(sample.key, list(sample.members)) for sample in found]


def test_a_key_is_the_path_up_to_the_first_dot_of_its_last_part() -> None:
    data = tar_bytes(
        [("./v1.0/a.seg.png", b""), ("v1.0/a.JPG", b""), ("v1.0/b.jpg", b""), ("b.jpg", b"")]
    )
    found, damage = walk(data)
    assert not damage
    assert extensions_by_key(found) == [
        ("v1.0/a", ["seg.png", "jpg"]),
        ("v1.0/b", ["jpg"]),
        ("b", ["jpg"]),
    ]


def test_a_repeated_extension_starts_the_next_sample() -> None:
    data = tar_bytes([("a.jpg", b"1"), ("a.txt", b"1"), ("a.jpg", b"2"), ("a.txt", b"2")])
    assert extensions_by_key(walk(data)[0]) == [("a", ["jpg", "txt"])] * 2


def test_names_without_key_or_extension_are_skipped() -> None:
    data = tar_bytes([("README", b"x"), (".hidden", b"x"), ("a.jpg", b"x"), ("d/.x.jpg", b"x")])
    assert extensions_by_key(walk(data)[0]) == [("a", ["jpg"])]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_non_ascii_names_are_read_in_both_tar_formats(format: int) -> None:
    keys = ["каталог/日本 語", "k" * 900, "d/" * 60 + "x"]
    data = tar_bytes([(f"{key}.jpg", b"x") for key in keys], format=format)
    assert [sample.key for sample in walk(data)[0]] == keys


def test_names_that_are_not_utf8_become_keys_with_replacement_characters() -> None:
    data = tar_bytes([("caf\udce9.jpg", b"x")], format=tarfile.GNU_FORMAT)
    assert [sample.key for sample in walk(data)[0]] == ["caf\ufffd"]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 2_000), min_size=1, max_size=12),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
)
def test_member_offsets_agree_with_tarfile(sizes: list[int], format: int) -> None:
    stored = [bytes([number]) * size for number, size in enumerate(sizes)]
    data = tar_bytes([(f"{n}.jpg", body) for n, body in enumerate(stored)], format=format)
    found, damage = walk(data)
    assert not damage
    members = [sample.members["jpg"] for sample in found]
    contents = [data[m.data_start : m.data_start + m.size] for m in members]
    assert contents == stored


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 8_000))
def test_a_truncated_tar_keeps_its_complete_samples_and_reports_damage(cut: int) -> None:
    names = [f"{key}.{extension}" for key in "abc" for extension in ("jpg", "txt")]
    data = tar_bytes([(name, name.encode() * 99) for name in names])
    end_mark = 6 * 2 * BLOCK  # each member is a header and one block: its data is 495 bytes
    cut = min(cut, end_mark)
    found, damage = walk(data[:cut])
    assert damage
    assert all(set(sample.members) == {"jpg", "txt"} for sample in found[1:])
    # A sample is known to be complete once the next header has been read.
    assert len(found) >= max(0, (cut - BLOCK) // (4 * BLOCK))
    assert len(found) <= -(-cut // (4 * BLOCK))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_neither_hang_the_walk_nor_raise_another_error(data: st.DataObject) -> None:
    raw = bytearray(tar_bytes([("d/" * 60 + f"{n}.jpg", b"x" * 700) for n in range(3)]))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    found, _ = walk(bytes(raw))
    assert len(found) <= 4


def forged(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with a valid checksum and an arbitrary size field."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_negative_and_huge_sizes_are_damage(kind: bytes) -> None:
    negative = b"\xff" * 10 + b"\xf0\x00"  # -4096: a walk that trusts it seeks backwards for ever
    valid = tar_bytes([("a.jpg", bytes(16 * BLOCK))])[: 17 * BLOCK]
    for size in (negative, b"77777777777\0", b"\x80" + b"\x7f" * 11):
        found, damage = walk(valid + forged("b", size, kind))
        assert extensions_by_key(found) == [("a", ["jpg"])] or found == []
        assert damage


def test_units_read_exactly_the_planned_rows(corpus: Store, output: str) -> None:
    members = [(f"{n}.{e}", f"{n}{e}".encode()) for n in range(10) for e in ("jpg", "txt")]
    corpus.put("a.tar", tar_bytes(members))
    planned = plan(corpus.uri, output, unit_rows=4)
    assert [unit.row_count for unit in planned.units] == [4, 4, 2]
    read = read_all(planned)
    assert read.schema == input_schema(planned.manifest.mapping.schema)
    assert read["_in_key"].to_pylist() == [str(n) for n in range(10)]
    assert read["_in_image"].to_pylist() == [f"{n}jpg".encode() for n in range(10)]
    assert read["txt"].to_pylist() == [f"{n}txt" for n in range(10)]
    assert read["_in_prompt"].to_pylist() == ["describe"] * 10


def test_units_stay_within_unit_bytes(corpus: Store, output: str) -> None:
    corpus.put("a.tar", tar_bytes([(f"{n}.jpg", bytes(3_000)) for n in range(6)]))
    units = plan(corpus.uri, output, unit_bytes=8_000).units
    assert [unit.row_count for unit in units] == [2, 2, 2]


def test_a_unit_is_read_by_one_ranged_request(corpus: Store, output: str) -> None:
    corpus.put("a.tar", tar_bytes([(f"{n}.jpg", bytes(3_000)) for n in range(6)]))
    planned = plan(corpus.uri, output, unit_rows=2)
    ranges: list[tuple[int, int]] = []

    class RecordingStore:
        def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
            ranges.append((start, stop))
            return corpus.get_range(key, start, stop, etag=etag)

    unit = planned.units[1]
    read_unit(RecordingStore(), unit, planned.manifest.mapping)  # type: ignore[arg-type]
    assert ranges == [(unit.byte_start, unit.byte_stop)]


def test_the_image_is_found_by_extension_and_may_be_missing(corpus: Store, output: str) -> None:
    members = [("a.webp", b"w"), ("b.png", b"p"), ("b.jpg", b"j"), ("c.txt", b"t"), ("d.npy", b"n")]
    corpus.put("a.tar", tar_bytes(members))
    read = read_all(plan(corpus.uri, output))
    assert read["_in_image"].to_pylist() == [b"w", b"j", None, None]
    assert read["_in_error_code"].to_pylist() == [None, None, "image_missing", "image_missing"]


@pytest.mark.parametrize("name", ["a.GIF", "a.input.png", "a.jfif", "a.Tiff", "a.img"])
def test_images_are_known_by_the_last_part_of_any_suffix(
    corpus: Store, output: str, name: str
) -> None:
    corpus.put("a.tar", tar_bytes([(name, b"bytes"), ("a.seg.npy", b"n"), ("a.txt", b"t")]))
    assert read_all(plan(corpus.uri, output))["_in_image"].to_pylist() == [b"bytes"]


@pytest.mark.parametrize(
    "content", [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBPVP8", b"0000ftypavif"]
)
def test_an_unknown_suffix_is_an_image_if_its_content_is(
    corpus: Store, output: str, content: bytes
) -> None:
    members = [("a.photo", content), ("a.npy", b"n"), ("b.photo", b"?"), ("c.p", content)]
    corpus.put("a.tar", tar_bytes([*members, ("c.q", content), ("d.pt", content)]))
    read = read_all(plan(corpus.uri, output))
    assert read["_in_image"].to_pylist() == [content, None, None, None]


def test_latents_beside_an_image_cost_nothing_and_are_named_in_the_plan(
    corpus: Store, output: str
) -> None:
    corpus.put("a.tar", tar_bytes([("p.png", b"png"), ("p.vae.pth", b"PK"), ("p.pkl", b"x")]))
    with capture_logs() as events:
        read = read_all(plan(corpus.uri, output))
    assert read["_in_image"].to_pylist() == [b"png"]
    (named,) = [event for event in events if event["event"] == "members_not_committed"]
    assert named["extensions"] == ["pkl", "vae.pth"]


def test_text_members_become_columns_and_others_are_dropped(corpus: Store, output: str) -> None:
    members = [("a.jpg", b"j"), ("a.json", b'{"x": 1}'), ("a.text", "ü".encode()), ("a.npy", b"n")]
    corpus.put("a.tar", tar_bytes([*members, ("b.jpg", b"j"), ("b.cls", b"7")]))
    planned = plan(corpus.uri, output)
    assert planned.manifest.mapping.schema.names == ["cls", "json", "source_text"]
    read = read_all(planned)
    assert read["json"].to_pylist() == ['{"x": 1}', None]
    assert read["source_text"].to_pylist() == ["ü", None]
    assert read["cls"].to_pylist() == [None, "7"]


def test_a_truncated_tar_gives_its_complete_samples_and_one_error_row(
    corpus: Store, output: str
) -> None:
    data = tar_bytes([(f"{n}.jpg", bytes([n]) * 2_000) for n in range(5)])
    corpus.put("bad.tar", data[: 3 * 5 * BLOCK + BLOCK + 100])
    corpus.put("good.tar", tar_bytes([("z.jpg", b"z")]))
    planned = plan(corpus.uri, output, unit_rows=2)
    read = read_all(planned)
    codes = list(zip(read["_in_key"].to_pylist(), read["_in_error_code"].to_pylist(), strict=True))
    assert codes == [
        ("0", None),
        ("1", None),
        ("2", None),
        (f"bad.tar@{3 * 5 * BLOCK}", "archive_truncated"),
        ("z", None),
    ]
    rows = [unit.row_count for unit in planned.units]
    assert rows == [2, 2, 1]
    assert planned.manifest.rows == 5


@pytest.mark.parametrize("data", [b"", b"x", b"not a tar at all" * 99, tar_bytes([])[:0]])
def test_a_file_that_is_not_a_tar_is_one_error_row(corpus: Store, output: str, data: bytes) -> None:
    corpus.put("bad.tar", data)
    read = read_all(plan(corpus.uri, output))
    assert read["_in_error_code"].to_pylist() == ["archive_truncated"]


def test_a_corpus_of_empty_tars_is_a_usage_error(corpus: Store, output: str) -> None:
    corpus.put("a.tar", tar_bytes([]))
    with pytest.raises(UsageError, match="without a single row"):
        plan(corpus.uri, output)


def test_dangerous_members_are_refused_and_affect_no_other_row(
    corpus: Store, output: str, tmp_path: Path
) -> None:
    """Links, devices and paths outside the archive: error rows. A pickle is never read. Nothing
    is on disk."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:

        def add(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(data))

        add("a.jpg")
        add("pickle.jpg")
        add("pickle.pyd", b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
        add("../../outside.jpg")
        add("/absolute.jpg")
        add("link.jpg", kind=tarfile.SYMTYPE)
        add("hard.jpg", kind=tarfile.LNKTYPE)
        add("device.jpg", kind=tarfile.CHRTYPE)
        add("z.jpg")
    corpus.put("a.tar", buffer.getvalue())
    before = sorted(path for path in tmp_path.rglob("*"))
    read = read_all(plan(corpus.uri, output))
    codes = dict(zip(read["_in_key"].to_pylist(), read["_in_error_code"].to_pylist(), strict=True))
    assert codes.pop("a") is None
    assert codes.pop("z") is None
    assert codes.pop("pickle") is None
    assert len(codes) == 5
    assert set(codes.values()) == {"read_failed"}
    messages = dict(
        zip(read["_in_key"].to_pylist(), read["_in_error_message"].to_pylist(), strict=True)
    )
    assert all("refused member" in message for message in messages.values() if message)
    assert messages["hard"].endswith("a hard link; pack again with tar --hard-dereference")
    assert messages["link"].endswith("a symbolic link; pack again with tar -h")
    after = sorted(path for path in tmp_path.rglob("*") if "out" not in path.parts)
    assert [path for path in after if "_run" not in str(path)][: len(before)] == before


def test_a_vqa_question_is_read_from_the_json_member(corpus: Store, output: str) -> None:
    good, other = json.dumps({"question": "why?", "answers": ["so"]}), json.dumps({"q": 1})
    members = [
        ("a.jpg", b"j"),
        ("a.json", good.encode()),
        ("b.jpg", b"j"),
        ("b.json", b"{broken"),
        ("c.jpg", b"j"),
        ("c.json", other.encode()),
        ("d.jpg", b"j"),
        ("e.jpg", b"j"),
        ("e.json", good.encode()),
    ]
    corpus.put("a.tar", tar_bytes(members))
    read = read_all(plan(corpus.uri, output, kind="vqa"))
    assert read["_in_prompt"].to_pylist() == ["why?", None, None, None, "why?"]
    invalid = ["prompt_invalid"] * 3
    assert read["_in_error_code"].to_pylist() == [None, *invalid, None]
    assert read["json"].to_pylist()[0] == good


def test_a_vqa_question_is_read_from_a_question_member(corpus: Store, output: str) -> None:
    corpus.put("a.tar", tar_bytes([("a.jpg", b"j"), ("a.question.txt", b"why?")]))
    planned = plan(corpus.uri, output, kind="vqa")
    assert read_all(planned)["_in_prompt"].to_pylist() == ["why?"]
    assert planned.manifest.mapping.schema.names == []


@pytest.mark.parametrize(
    ("extension", "content"),
    [
        ("question.txt", "où ?".encode("latin-1")),
        ("question", "why?".encode("utf-16")),
        ("json", '{"question": "où ?"}'.encode("latin-1")),
    ],
)
def test_a_question_that_is_not_utf8_costs_its_row_and_is_never_asked(
    corpus: Store, output: str, extension: str, content: bytes
) -> None:
    good = b'{"question": "why?"}' if extension == "json" else b"why?"
    members = [("a.jpg", b"j"), (f"a.{extension}", content), ("b.jpg", b"j")]
    corpus.put("a.tar", tar_bytes([*members, (f"b.{extension}", good)]))
    read = read_all(plan(corpus.uri, output, kind="vqa"))
    assert read["_in_prompt"].to_pylist() == [None, "why?"]
    assert read["_in_error_code"].to_pylist() == ["prompt_invalid", None]
    message = "the question is not UTF-8: store it as that"
    assert read["_in_error_message"].to_pylist() == [message, None]


def test_bytes_that_are_no_utf8_elsewhere_in_a_record_cost_no_question(
    corpus: Store, output: str
) -> None:
    record = '{"author": "Zoë", "question": "why?"}'.encode("latin-1")
    corpus.put("a.tar", tar_bytes([("a.jpg", b"j"), ("a.json", record)]))
    read = read_all(plan(corpus.uri, output, kind="vqa"))
    assert read["_in_prompt"].to_pylist() == ["why?"]
    assert read["json"].to_pylist() == ['{"author": "Zo\ufffd", "question": "why?"}']


@pytest.mark.parametrize("extension", ["json", "question.txt"])
def test_a_byte_order_mark_before_a_question_is_no_part_of_it(
    corpus: Store, output: str, extension: str
) -> None:
    content = b'{"question": "why?"}' if extension == "json" else b"why?"
    members = [("a.jpg", b"j"), (f"a.{extension}", b"\xef\xbb\xbf" + content)]
    corpus.put("a.tar", tar_bytes([*members, ("a.txt", b"\xef\xbb\xbfred"), ("b.txt", b"\xff")]))
    read = read_all(plan(corpus.uri, output, kind="vqa"))
    assert read["_in_prompt"].to_pylist() == ["why?", None]
    assert read["_in_error_code"].to_pylist()[0] is None
    assert read["txt"].to_pylist() == ["red", "\ufffd"]
    if extension == "json":
        assert read["json"].to_pylist() == [content.decode(), None]


def test_a_vqa_corpus_without_question_members_is_refused_at_planning(
    corpus: Store, output: str
) -> None:
    corpus.put("a.tar", tar_bytes([("a.jpg", b"j"), ("a.txt", b"t")]))
    with pytest.raises(UsageError, match=r"give each sample a \.json"):
        plan(corpus.uri, output, kind="vqa")


def test_a_replaced_tar_gives_error_rows_for_its_planned_rows(corpus: Store, output: str) -> None:
    corpus.put("a.tar", tar_bytes([("a.jpg", b"j"), ("b.jpg", b"j"), ("b.txt", b"t")]))
    planned = plan(corpus.uri, output)
    corpus.put("a.tar", tar_bytes([("other.jpg", b"j")]))
    read = read_all(planned)
    assert read["_in_error_code"].to_pylist() == ["read_failed"] * 2
    assert read.schema == input_schema(planned.manifest.mapping.schema)
    assert pa.types.is_string(read.schema.field("txt").type)


def test_a_row_limit_ends_a_unit_within_its_byte_range(corpus: Store, output: str) -> None:
    members = [(f"{n}.jpg", bytes(1_000)) for n in range(10)]
    corpus.put("a.tar", tar_bytes(members)[: 10 * 3 * BLOCK - 700])
    planned = plan(corpus.uri, output, unit_rows=4, limit=6)
    assert [unit.row_count for unit in planned.units] == [4, 2]
    assert read_all(planned)["_in_key"].to_pylist() == [str(n) for n in range(6)]


def test_half_a_surrogate_pair_costs_its_own_row_alone(corpus: Store, output: str) -> None:
    questions = [b'{"question": "fine"}', b'{"question": "\\ud800"}']
    members = [
        member
        for n, question in enumerate(questions)
        for member in ((f"{n}.jpg", b"jpeg"), (f"{n}.json", question))
    ]
    corpus.put("a.tar", tar_bytes(members))
    read = read_all(plan(corpus.uri, output, kind="vqa", prompt="{question}"))
    assert read["_in_error_code"].to_pylist() == [None, "prompt_invalid"]
    assert read["_in_prompt"].to_pylist() == ["fine", "?"]


def test_members_that_are_not_sorted_by_key_are_refused_with_both_places(
    corpus: Store, output: str
) -> None:
    names = [f"u{n}.{extension}" for extension in ("png", "txt") for n in range(3)]
    corpus.put("a.tar", tar_bytes([(name, b"x") for name in names]))
    with pytest.raises(UsageError, match=r"u0 is at byte 0 and.*at byte 3,072.*--sort=name"):
        plan(corpus.uri, output)


def test_one_stray_member_is_a_row_of_its_own_and_named(corpus: Store, output: str) -> None:
    names = ["a.png", "b.png", "b.txt", "a.txt", "c.png", "c.txt"]
    corpus.put("a.tar", tar_bytes([(name, b"x") for name in names]))
    with capture_logs() as events:
        read = read_all(plan(corpus.uri, output))
    assert read["_in_key"].to_pylist() == ["a", "b", "a", "c"]
    assert read["_in_error_code"].to_pylist() == [None, None, "image_missing", None]
    (named,) = [event for event in events if event["event"] == "archive_suspect"]
    assert "a at byte 0 comes back with other members at byte 3,072" in named["reason"]


def test_keys_that_repeat_with_the_same_extensions_are_samples(corpus: Store, output: str) -> None:
    members = [("0.jpg", b"0"), ("1.jpg", b"1")]
    corpus.put("a.tar", tar_bytes(members) + tar_bytes(members))
    assert read_all(plan(corpus.uri, output))["_in_key"].to_pylist() == ["0", "1", "0", "1"]


def test_keys_with_dots_are_refused_with_the_rule_or_read_by_the_last_dot(
    corpus: Store, output: str
) -> None:
    members = [(f"shot.{n}.{e}", f"{n}{e}".encode()) for n in range(9) for e in ("png", "txt")]
    corpus.put("a.tar", tar_bytes(members))
    with pytest.raises(UsageError, match=r"first dot of the file name.*--dotted-keys"):
        plan(corpus.uri, output)
    planned = plan(corpus.uri, output, dotted_keys=True, unit_rows=4)
    assert Manifest.from_json(planned.manifest.to_json()).mapping.dotted_keys
    read = read_all(planned)
    assert read["_in_key"].to_pylist() == [f"shot.{n}" for n in range(9)]
    assert read["txt"].to_pylist() == [f"{n}txt" for n in range(9)]


def test_a_mask_beside_the_image_is_no_rival_of_it(corpus: Store, output: str) -> None:
    corpus.put("a.tar", tar_bytes([("a.mask.png", b"m"), ("a.png", b"i"), ("a.seg.png", b"s")]))
    with capture_logs() as events:
        assert read_all(plan(corpus.uri, output))["_in_image"].to_pylist() == [b"i"]
    (named,) = [event for event in events if event["event"] == "members_not_committed"]
    assert named["extensions"] == ["mask.png", "seg.png"]


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gzip"), (lzma.compress, "xz")])
def test_a_compressed_tar_is_refused_with_the_command_to_type(
    corpus: Store, output: str, pack: Callable[[bytes], bytes], name: str
) -> None:
    corpus.put("a.tar", pack(tar_bytes([("a.png", b"x")])))
    with pytest.raises(UsageError, match=rf"this is {name}.*-d?c a\.tar > plain\.tar"):
        plan(corpus.uri, output)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("names", [["a.png", "b.png"], []])
def test_a_zip_is_refused_with_the_command_that_makes_a_tar_of_it(
    corpus: Store, output: str, method: int, names: list[str]
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name in names:
            archive.writestr(name, b"x" * 700)
    corpus.put("a b.tar", buffer.getvalue())
    with pytest.raises(UsageError, match=r"this is zip.*unzip -q 'a b\.tar' -d files && tar"):
        plan(corpus.uri, output)


@given(st.sampled_from(sorted(PACKED.items())), st.binary(max_size=1_200))
def test_a_file_that_begins_as_other_formats_do_is_refused_unless_it_is_a_tar(
    tmp_path_factory: pytest.TempPathFactory,
    packed: tuple[bytes, tuple[str, str]],
    rest: bytes,
) -> None:
    magic, (name, _) = packed
    store = open_store(str(tmp_path_factory.mktemp("packed")))
    bounds: dict[str, Any] = {"unit_rows": 10, "unit_bytes": 10**6}
    store.put("a.tar", magic + rest)
    with pytest.raises(UsageError, match=rf"a\.tar: this is {name}, not a plain tar"):
        index_tar(store, store.list()[0], **bounds)
    member = magic.decode("utf-8", "surrogateescape").partition("\0")[0] + ".jpg"
    store.put("a.tar", tar_bytes([(member, rest)], format=tarfile.GNU_FORMAT))
    assert index_tar(store, store.list()[0], **bounds).rows == 1


def test_damage_is_reported_by_plan_row_and_manifest(corpus: Store, output: str) -> None:
    members = [(f"{n:04}.png", bytes([n + 1]) * 500) for n in range(40)]
    data = bytearray(tar_bytes(members))
    data[10 * 2 * BLOCK : 10 * 2 * BLOCK + BLOCK] = bytes(BLOCK)
    corpus.put("a.tar", bytes(data))
    with capture_logs() as events:
        planned = plan(corpus.uri, output, unit_rows=16)
    (named,) = [event for event in events if event["event"] == "archive_damaged"]
    assert (named["unread_bytes"], named["rows"], named["error_rows"]) == (2 * BLOCK, 39, 1)
    manifest = Manifest.from_json(planned.manifest.to_json())
    assert manifest == planned.manifest
    assert (manifest.rows, manifest.unread_bytes) == (40, 2 * BLOCK)
    assert summarise(planned.output).unread_bytes == 2 * BLOCK
    rows = read_all(planned).to_pylist()
    assert rows[10]["_in_key"] == "a.tar@10240"
    assert "bytes 10,240 to 11,264 of a.tar not read" in rows[10]["_in_error_message"]
    assert [r["_in_key"] for r in rows if not r["_in_error_code"]] == [
        f"{n:04}" for n in range(40) if n != 10
    ]
    assert plan(corpus.uri, f"{output}/limited", limit=12).manifest.rows == 12


def test_a_damaged_range_is_not_fetched(corpus: Store, output: str) -> None:
    data = tar_bytes([(f"{n}.png", b"x") for n in range(3)])[: 6 * BLOCK]
    corpus.put("a.tar", data + bytes(2**20) + tar_bytes([("z.png", b"z")]))
    planned = plan(corpus.uri, output)
    (unit,) = planned.units
    assert unit.size_bytes == 8 * BLOCK
    asked: list[int] = []

    class CountingStore:
        def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
            asked.append(stop - start)
            return corpus.get_range(key, start, stop, etag=etag)

    read_unit(CountingStore(), unit, planned.manifest.mapping)  # type: ignore[arg-type]
    assert sum(asked) == 8 * BLOCK


def test_a_unit_that_an_earlier_version_planned_over_a_cut_tar_reads_the_same_rows(
    corpus: Store, output: str
) -> None:
    data = tar_bytes([(f"{n}.jpg", bytes([n]) * 2_000) for n in range(3)])
    corpus.put("bad.tar", data[: 2 * 5 * BLOCK + BLOCK + 100])
    planned = plan(corpus.uri, output)
    (info,) = corpus.list()
    place = {"byte_start": 0, "byte_stop": 2 * 5 * BLOCK, "size_bytes": 2 * 5 * BLOCK}
    unit = make_unit("webdataset", info, row_start=0, row_count=3, truncated=True, **place)
    rows = read_unit(corpus, unit, planned.manifest.mapping).to_pylist()
    assert [(row["_in_key"], row["_in_error_code"]) for row in rows] == [
        ("0", None),
        ("1", None),
        ("bad.tar", "archive_truncated"),
    ]
