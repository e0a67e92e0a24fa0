"""A drawn corpus and the truth about it: what each row must become, whoever reads it.

Every row carries its serial number in a column of its own (`serial` in Parquet, `id` in tars), so
an output row is known by more than its key and its place.
"""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.chaos.engine import CALM, KILLS, RAISES, expected_control, expected_text

Format: TypeAlias = Literal["parquet", "tar"]
Task: TypeAlias = Literal["caption", "vqa"]

PROMPT: Final = "describe the image."
"""Prompt of every caption row."""
TEXT: Final = "text"
"""The outcome of a row that is answered; every other outcome is an error code."""
_BROKEN_TEXT = frozenset({"read_failed", "prompt_invalid", "text_invalid"})

BAD_ROWS: Final[dict[str, frozenset[str]]] = {
    "corrupt_image": frozenset({"image_undecodable"}),
    "html_image": frozenset({"image_undecodable"}),
    "empty_image": frozenset({"image_undecodable", "image_missing"}),
    "bomb": frozenset({"image_too_large"}),
    "no_image": frozenset({"image_missing"}),
    "no_question": frozenset({"prompt_invalid"}),
    "key_not_utf8": _BROKEN_TEXT,
    "question_not_utf8": _BROKEN_TEXT,
    "note_not_utf8": _BROKEN_TEXT | {TEXT},
    "raises": frozenset({"inference_failed"}),
    "kills": frozenset({"poison_row"}),
}
"""By kind of bad row: what it may become."""
IN_TARS: Final = (
    "corrupt_image", "html_image", "empty_image", "bomb", "no_image", "raises", "kills"
)  # fmt: skip
"""Kinds of bad rows that a tar can hold."""
DAMAGES: Final = ("cut", "zeroed", "joined")
"""Damage of one archive: its end is missing; a header is zeroed; a second archive follows the end
mark of the first."""
_DAMAGE_CODES = frozenset({"archive_truncated", "archive_damaged", "read_failed", "image_missing"})
_BAD_BYTES = b"\xff\xfe\xa0"
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusShape:
    """What is drawn."""

    format: Format
    """Parquet files or tars."""
    task: Task
    """caption, or vqa: each row has its own question."""
    rows: int
    """Rows of all files."""
    files: int
    """Files."""
    bad: tuple[str, ...]
    """Kinds of bad rows, one row each."""
    damage: str | None = None
    """Damage of the last tar; None for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrueRow:
    """One row, and what it must become."""

    serial: int
    """Its number in the corpus."""
    key: str | None
    """Its key, unique; None where it cannot be read."""
    outcomes: frozenset[str]
    """TEXT, or the error codes it may end with."""
    text: str | None
    """The only right text; None where it must not be answered."""
    control: str | None
    """The only right text of its dense twin, where it has one."""
    question: str | None = None
    """Its question; None where it has none that can be read."""
    note: str | None = None
    """What the column `note` holds; None where that is not to be checked."""
    optional: bool = False
    """Whether damage took its members: it may be missing, or end in any way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Files and their truth."""

    files: dict[str, bytes]
    """Objects by name."""
    rows: tuple[TrueRow, ...]
    """Every row, in corpus order."""
    serial_column: str
    """Where the output holds a row's serial number."""
    damage_rows: int
    """Most error rows that stand for damage and are no row of the corpus."""
    damage_codes: frozenset[str]
    """The codes that these may have."""
    is_damaged: bool
    """Whether bytes of an archive are gone: that must be told, by a row and in the summary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    serial: int
    key: str
    kind: str | None
    image: bytes | None
    question: str | None


def draw_corpus(shape: CorpusShape, seed: int) -> Corpus:
    """The corpus of a shape: the same for the same seed, byte for byte."""
    draw = random.Random(f"corpus:{seed}")
    places = dict(zip(draw.sample(range(shape.rows), len(shape.bad)), shape.bad, strict=True))
    drawn = [_draw_row(serial, places.get(serial), shape, seed) for serial in range(shape.rows)]
    cuts = [shape.rows * number // shape.files for number in range(shape.files + 1)]
    parts = [drawn[a:b] for a, b in pairwise(cuts)]
    hurt: set[int] = set()
    files: dict[str, bytes] = {}
    for number, part in enumerate(parts):
        if shape.format == "parquet":
            files[f"{number:05}.parquet"] = _parquet(part, shape, draw.randint(10, 48))
        elif shape.damage is None or number < shape.files - 1:
            files[f"{number:05}.tar"] = _tar(part, shape)
        else:
            files[f"{number:05}.tar"], hurt = _damaged_tar(part, shape, draw)
    return Corpus(
        files=files,
        rows=tuple(_truth(row, shape, hurt) for row in drawn),
        serial_column="serial" if shape.format == "parquet" else "id",
        # A reader may report damage once for itself and once for each sample that it cut.
        damage_rows=2 + len(hurt) if hurt else 0,
        damage_codes=_DAMAGE_CODES,
        is_damaged=bool(hurt),
    )


def _draw_row(serial: int, kind: str | None, shape: CorpusShape, seed: int) -> _Drawn:
    question = f"what is {serial} of {seed}?" if shape.task == "vqa" else None
    behaviour = {"kills": KILLS, "raises": RAISES}.get(kind or "", CALM)
    image: bytes | None = _png(_picture(serial, behaviour))
    assert image is not None
    broken: dict[str, Callable[[bytes], bytes | None]] = {
        "corrupt_image": lambda png: png[: len(png) // 2],
        "html_image": lambda png: b"<html><body>404</body></html>",
        "empty_image": lambda png: b"",
        "bomb": lambda png: _bomb(),
        "no_image": lambda png: None,
    }
    if kind in broken:
        image = broken[kind](image)
    if kind == "no_question":
        question = None
    return _Drawn(serial=serial, key=f"k{seed}-{serial:04}", kind=kind, image=image,
                  question=question)  # fmt: skip


def _truth(row: _Drawn, shape: CorpusShape, hurt: set[int]) -> TrueRow:
    outcomes = BAD_ROWS[row.kind] if row.kind else frozenset({TEXT})
    text = control = None
    if TEXT in outcomes:
        prompt = PROMPT if shape.task == "caption" else row.question
        assert prompt is not None
        picture = _picture(row.serial, CALM)
        text, control = expected_text(picture, prompt), expected_control(picture, prompt)
    has_note = shape.format == "parquet" and row.kind != "note_not_utf8"
    return TrueRow(
        serial=row.serial,
        key=None if row.kind == "key_not_utf8" else row.key,
        outcomes=outcomes,
        text=text,
        control=control,
        question=None if row.kind == "question_not_utf8" else row.question,
        note=f"note {row.serial}" if has_note else None,
        optional=row.serial in hurt,
    )


def _picture(serial: int, behaviour: int) -> Image.Image:
    return Image.new("RGB", (6, 6), (serial % 256, serial // 256 % 256, behaviour))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _bomb() -> bytes:
    """A PNG of a few bytes that claims 2.5 billion pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def _parquet(rows: Sequence[_Drawn], shape: CorpusShape, group_rows: int) -> bytes:
    def texts(values: Sequence[str | None], broken: str) -> pa.Array:
        raw = [
            _BAD_BYTES if row.kind == broken else value and value.encode()
            for row, value in zip(rows, values, strict=True)
        ]
        return pa.array(raw, pa.binary()).view(pa.string())  # not validated, as in the wild

    columns = {
        "image": pa.array(
            [None if row.image is None else {"bytes": row.image, "path": f"{row.serial}.png"}
             for row in rows], _IMAGE
        ),
        "key": texts([row.key for row in rows], "key_not_utf8"),
        "serial": pa.array([row.serial for row in rows], pa.int64()),
        "note": texts([f"note {row.serial}" for row in rows], "note_not_utf8"),
    }  # fmt: skip
    if shape.task == "vqa":
        columns["question"] = texts([row.question for row in rows], "question_not_utf8")
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=group_rows)
    return buffer.getvalue()


def _members(row: _Drawn) -> list[tuple[str, bytes]]:
    record = {"question": row.question} if row.question is not None else {"note": row.serial}
    named = [("json", json.dumps(record).encode()), ("id", str(row.serial).encode())]
    image = [] if row.image is None else [("png", row.image)]
    return [(f"{row.key}.{extension}", data) for extension, data in image + named]


def _tar(rows: Sequence[_Drawn], shape: CorpusShape) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row in rows:
            for name, data in _members(row):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _damaged_tar(
    rows: Sequence[_Drawn], shape: CorpusShape, draw: random.Random
) -> tuple[bytes, set[int]]:
    """The damaged archive, and the serials of the rows whose members it lost."""
    at = draw.randrange(1, len(rows) - 1)
    if shape.damage == "joined":
        return _tar(rows[:at], shape) + _tar(rows[at:], shape), set()
    whole = _tar(rows, shape)
    sizes = [sum(512 + -(-len(data) // 512) * 512 for _, data in _members(row)) for row in rows]
    start = sum(sizes[:at])
    if shape.damage == "cut":
        # Within the row's first member; the rows after it are nowhere.
        return whole[: start + 600], {row.serial for row in rows[at:]}
    assert shape.damage == "zeroed"
    return whole[:start] + bytes(512) + whole[start + 512 :], {rows[at].serial}
