"""Drawn corpora and their truth: what the project's readers and decoder make of the bytes is what
the truth says, damaged archives among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import MediaLimits
from cluster.errors import RowError
from cluster.images import decode_image
from tests.chaos.corpus import BAD_ROWS, DAMAGES, IN_TARS, PROMPT, CorpusShape, draw_corpus
from tests.chaos.engine import KILLS, RAISES, expected_text
from tests.chaos.judge import check_rows
from tests.cluster.corpora import plan, read_all
from tests.cluster.fake_engine import first_kept


def read(row: dict[str, Any]) -> dict[str, Any]:
    """The output row of a row as read, as the engine of these runs answers it."""
    code, text = row["_in_error_code"], None
    if code is None:
        try:
            image = decode_image(row["_in_image"], MediaLimits())
            behaviour = image.getpixel((0, 0))
            assert isinstance(behaviour, tuple)
            code = {KILLS: "poison_row", RAISES: "inference_failed"}.get(int(behaviour[2]))
            text = None if code else expected_text(image, row["_in_prompt"])
        except RowError as error:
            code = error.code
    return row | {
        "key": row["_in_key"],
        "text": text,
        "error_code": code,
        "error_message": row["_in_error_message"],
        "run_id": "run-1",
        "unit_id": row["_in_unit"],
        "unit_row": row["_in_row"],
        "visual_tokens": 100,
        "visual_tokens_kept": 25,
        "kept_tokens": first_kept(25, 100),
        "attempts": 2 if code == "inference_failed" else 1,
        "is_control": False,
        "control_text": None,
        "question": row["_in_prompt"],
        "answer": text,
    }


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("damage", [None, *DAMAGES])
def test_the_readers_find_the_rows_of_every_tar(tmp_path: Path, damage: Any, seed: int) -> None:
    shape = CorpusShape(
        format="tar", task="caption", rows=40, files=2, bad=tuple(IN_TARS), damage=damage
    )
    check(tmp_path, shape, seed)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_readers_find_the_rows_of_every_parquet_file(tmp_path: Path, seed: int) -> None:
    shape = CorpusShape(format="parquet", task="vqa", rows=60, files=3, bad=tuple(BAD_ROWS))
    check(tmp_path, shape, seed)


def check(folder: Path, shape: CorpusShape, seed: int) -> None:
    corpus = draw_corpus(shape, seed)
    (folder / "in").mkdir()
    for name, data in corpus.files.items():
        (folder / "in" / name).write_bytes(data)
    settings: dict[str, Any] = {"unit_rows": 8, "prompt": PROMPT}
    if shape.task == "vqa":
        settings |= {"kind": "vqa", "prompt": "{question}"}
    planned = plan(str(folder / "in"), str(folder / "out"), **settings)
    rows = [read(row) for row in read_all(planned).to_pylist()]
    assert check_rows(corpus, rows) == []
