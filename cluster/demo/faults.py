"""What goes wrong in real corpora, planted on purpose, with what each row must become."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.config import Kind
from cluster.corpus.unit import Format
from cluster.demo.drawn_rows import Row

FAULT_SHARE = 0.03
# From this many rows on, every fault occurs at least once.
EVERY_FAULT_ROWS = 200
_BOMB_PIXELS = 50_000
_HTML = b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One planted fault. row counts from the corpus's first; error_code is what the row must
    become, None where it must be answered as if nothing were wrong."""

    row: int
    key: str
    fault: str
    error_code: str | None


def plant(
    rows: Sequence[Row], *, kind: Kind, format: Format, seed: int
) -> tuple[list[Row], list[Fault]]:
    """A copy of the rows with about 3 % of them broken, the same ones for the same seed."""
    breakers = _breakers(format)
    if kind == "vqa":
        breakers["no_question"] = (_no_question, "prompt_invalid")
    least = len(breakers) if len(rows) >= EVERY_FAULT_ROWS else 1
    # Every second row stays sound, so that no fault meets another or a missing neighbour.
    candidates = range(1, len(rows), 2)
    number = min(len(candidates), max(least, round(FAULT_SHARE * len(rows))))
    generator = random.Random(f"faults:{seed}")
    picked = generator.sample(candidates, number)
    kinds = sorted(breakers)
    generator.shuffle(kinds)
    broken = list(rows)
    faults = []
    for index, row in enumerate(picked):
        name = kinds[index % len(kinds)]
        breaker, error_code = breakers[name]
        broken[row] = breaker(rows[row], rows[row - 1])
        fault = Fault(row=row, key=broken[row].key, fault=name, error_code=error_code)
        faults.append(fault)
    return broken, sorted(faults, key=lambda fault: fault.row)


def _breakers(format: Format) -> dict[str, tuple[Callable[[Row, Row], Row], str | None]]:
    """By name: how to break a row, given the row before it, and what it then becomes."""
    # Tar names are paths: a slash makes a folder, and the first dot would end the key.
    long_key = "long-" + "k" * (4_091 if format == "parquet" else 245)
    return {
        "corrupt_jpeg": (_image(lambda jpeg: jpeg[:20] + jpeg[40:20:-1] * 50), "image_undecodable"),
        "truncated_jpeg": (_image(lambda jpeg: jpeg[: len(jpeg) // 2]), "image_undecodable"),
        "empty_image": (_image(lambda jpeg: b""), "image_undecodable"),
        "html_image": (_image(lambda jpeg: _HTML), "image_undecodable"),
        "image_bomb": (_image(lambda jpeg: _bomb()), "image_too_large"),
        "no_image": (lambda row, before: replace(row, image=None), "image_missing"),
        "duplicate_key": (lambda row, before: replace(row, key=before.key), None),
        "odd_key": (_key(lambda key: f"каталог/日本 語/{key} 🦆'\""), None),
        "long_key": (_key(lambda key: f"{long_key}"), None),
    }


def _image(spoil: Callable[[bytes], bytes]) -> Callable[[Row, Row], Row]:
    return lambda row, before: replace(row, image=spoil(row.image or b""))


def _key(rename: Callable[[str], str]) -> Callable[[Row, Row], Row]:
    return lambda row, before: replace(row, key=rename(row.key))


def _no_question(row: Row, before: Row) -> Row:
    return replace(row, question=None)


def _bomb() -> bytes:
    """A PNG of some hundred bytes that claims 2.5 billion pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", _BOMB_PIXELS, _BOMB_PIXELS, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
