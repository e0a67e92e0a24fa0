"""Faults of real corpora, planted on purpose, with the outcome each row must have."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from cluster.config import Kind
from cluster.corpus.unit import Format
from cluster.demo.drawn_rows import DrawnRow

FAULT_SHARE = 0.03
# A corpus of at least this many rows contains every fault at least once.
EVERY_FAULT_ROWS = 200
_BOMB_PIXELS = 50_000
_HTML = b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>"


Breaker: TypeAlias = Callable[[DrawnRow, DrawnRow], DrawnRow]
"""Makes a faulty row from an intact one and the row before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One planted fault."""

    row: int
    """Row number in the corpus, from 0."""
    key: str
    """The row's key, as the corpus has it."""
    fault: str
    """Name of the fault."""
    error_code: str | None
    """Error code that the row must get; None if it must be answered normally."""


def plant_faults(
    rows: Sequence[DrawnRow], *, kind: Kind, format: Format, seed: int
) -> tuple[list[DrawnRow], list[Fault]]:
    """A copy of the rows with about 3 % of them faulty; the same seed breaks the same rows."""
    breakers = _breakers(format)
    if kind == "vqa":
        breakers["no_question"] = (_drop_question, "prompt_invalid")
    fewest = len(breakers) if len(rows) >= EVERY_FAULT_ROWS else 1
    # Every second row stays intact, so that no fault meets another one or lacks a row before it.
    candidates = range(1, len(rows), 2)
    count = min(len(candidates), max(fewest, round(FAULT_SHARE * len(rows))))
    generator = random.Random(f"faults:{seed}")
    picked = generator.sample(candidates, count)
    kinds = sorted(breakers)
    generator.shuffle(kinds)
    faulty = list(rows)
    faults = []
    for index, row in enumerate(picked):
        name = kinds[index % len(kinds)]
        breaker, error_code = breakers[name]
        faulty[row] = breaker(rows[row], rows[row - 1])
        fault = Fault(row=row, key=faulty[row].key, fault=name, error_code=error_code)
        faults.append(fault)
    return faulty, sorted(faults, key=lambda fault: fault.row)


def _breakers(format: Format) -> dict[str, tuple[Breaker, str | None]]:
    """By name of the fault: how to break a row, and the error code that it must get."""
    # Tar member names are paths: a slash makes a folder, and the first dot ends the key.
    long_key = "long-" + "k" * (4_091 if format == "parquet" else 245)
    return {
        "corrupt_jpeg": (
            _break_image(lambda jpeg: jpeg[:20] + jpeg[40:20:-1] * 50),
            "image_undecodable",
        ),
        "truncated_jpeg": (_break_image(lambda jpeg: jpeg[: len(jpeg) // 2]), "image_undecodable"),
        "empty_image": (_break_image(lambda jpeg: b""), "image_undecodable"),
        "html_image": (_break_image(lambda jpeg: _HTML), "image_undecodable"),
        "image_bomb": (_break_image(lambda jpeg: _make_bomb()), "image_too_large"),
        "no_image": (lambda row, before: replace(row, image=None), "image_missing"),
        "duplicate_key": (lambda row, before: replace(row, key=before.key), None),
        "odd_key": (_change_key(lambda key: f"каталог/日本 語/{key} 🦆'\""), None),
        "long_key": (_change_key(lambda key: f"{long_key}"), None),
    }


def _break_image(change: Callable[[bytes], bytes]) -> Breaker:
    return lambda row, before: replace(row, image=change(row.image or b""))


def _change_key(rename: Callable[[str], str]) -> Breaker:
    return lambda row, before: replace(row, key=rename(row.key))


def _drop_question(row: DrawnRow, before: DrawnRow) -> DrawnRow:
    return replace(row, question=None)


def _make_bomb() -> bytes:
    """A PNG of some hundred bytes that claims 2.5 billion pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", _BOMB_PIXELS, _BOMB_PIXELS, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
