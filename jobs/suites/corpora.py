"""Corpora for the suites that run jobs: drawn scenes, in files of so many rows each.

Replicas remember what images were encoded to. Another seed draws other scenes: with one of its own
no round finds an image that an earlier one has left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from cluster.demo import Row, draw_rows, parquet_file
from cluster.store import open_store
from sppruner.tiny.questions import caption
from sppruner.tiny.scenes import HELD_OUT_SEED, encode_scene, sample_scene

_SCENES_PER_SEED = 1_000_000


def captioned(count: int, seed: int) -> list[Row]:
    """Rows that the embedded model was taught to caption."""
    return list(islice(draw_rows("caption", seed), count))


def squares(count: int, seed: int, side: int) -> list[Row]:
    """Rows of any scenes, whose images are `side` pixels wide and high."""
    rows = []
    first = HELD_OUT_SEED + seed * _SCENES_PER_SEED
    for number in range(first, first + count):
        scene = sample_scene(number)
        image = encode_scene(scene, side)
        rows.append(Row(key=f"scene-{number}", image=image, caption=caption(scene)))
    return rows


def write_corpus(uri: str, rows: Sequence[Row], file_rows: int) -> None:
    """The rows in order, `file_rows` a file: a unit each for a job whose units are as long."""
    store = open_store(uri)
    for number, first in enumerate(range(0, len(rows), file_rows)):
        part = rows[first : first + file_rows]
        store.put(f"{number:05}.parquet", parquet_file(part, "caption"))
