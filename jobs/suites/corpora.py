"""Corpora for the suites that run jobs: drawn scenes in files of a given number of rows.

Replicas cache vision features of recent images. Different seeds draw different scenes, so a round
with its own seed finds none of its images in the encoder cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from cluster.demo import DrawnRow, draw_rows, encode_parquet
from cluster.demo.drawn_rows import SCENES_PER_SEED
from cluster.store import open_store
from sppruner.tiny.questions import caption
from sppruner.tiny.scenes import HELD_OUT_SEED, encode_scene, sample_scene


def draw_captioned(count: int, seed: int) -> list[DrawnRow]:
    """Rows whose scenes the embedded model was trained to caption."""
    return list(islice(draw_rows("caption", seed), count))


def draw_squares(count: int, seed: int, side: int) -> list[DrawnRow]:
    """Rows of arbitrary scenes with images of `side` x `side` pixels."""
    rows = []
    first = HELD_OUT_SEED + seed * SCENES_PER_SEED
    for number in range(first, first + count):
        scene = sample_scene(number)
        image = encode_scene(scene, side)
        rows.append(DrawnRow(key=f"scene-{number}", image=image, caption=caption(scene)))
    return rows


def write_corpus(uri: str, rows: Sequence[DrawnRow], file_rows: int) -> None:
    """Writes the rows in order, `file_rows` per file, so that a file is one unit of `file_rows`."""
    store = open_store(uri)
    for number, first in enumerate(range(0, len(rows), file_rows)):
        rows_of_file = rows[first : first + file_rows]
        store.put(f"{number:05}.parquet", encode_parquet(rows_of_file, "caption"))
