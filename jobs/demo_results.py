"""Keeps the results of an embedded run, whose object store ends with the command: labelled rows,
summary and a contact sheet, in a local folder.
"""

from __future__ import annotations

import io
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.config import Kind
from cluster.demo.contact_sheet import Tile, write_contact_sheet
from cluster.errors import UsageError
from cluster.output.summary import Summary
from cluster.store import Store, open_store

_TILES = 24
_PRINTED_ROWS = 8
_CAPTION_COLUMNS = ["text", "caption"]
_SUMMARY = "summary.json"
_SHEET = "sheet.png"


def check_folder(kind: Kind, folder: Path) -> None:
    """Raises UsageError where `folder`/<kind> holds anything but what an earlier embedded run left:
    a folder of this name may be somebody's output or corpus."""
    target = folder / kind
    there = target.iterdir() if target.is_dir() else ()
    others = {path for path in there if not path.name.startswith(".")} - _earlier(target)
    if others:
        raise UsageError(
            f"{min(others)} is none of an embedded run's results, which are kept in {target}: move "
            "it, or run the command in another folder"
        )


def _earlier(target: Path) -> set[Path]:
    """What an embedded run left there: its rows are named after the run of its summary and their
    unit, or after the unit alone by earlier versions."""
    found = {target / _SUMMARY, target / _SHEET}
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        run_id = json.loads((target / _SUMMARY).read_bytes())["run_id"]
        ours = re.compile(rf"({re.escape(run_id)}-)?[0-9a-f]{{20}}\.parquet")
        found |= {path for path in target.glob("*.parquet") if ours.fullmatch(path.name)}
    return found


def copy_results(kind: Kind, summary: Summary, folder: Path) -> str:
    """Copies the output to `folder`/<kind> in place of an earlier one, draws the contact sheet and
    returns a message about both."""
    output, corpus = open_store(summary.output), open_store(summary.input)
    target = folder / kind
    target.mkdir(parents=True, exist_ok=True)
    for stale in _earlier(target):
        stale.unlink(missing_ok=True)
    # Before the rows: by it they are known for ours if this is the last that can be written.
    (target / _SUMMARY).write_text(summary.to_json())
    tables = []
    for info in output.list(suffixes=(".parquet",)):
        data = output.get(info.key)
        (target / info.key).write_bytes(data)
        tables.append(pq.read_table(io.BytesIO(data)))
    labelled = pa.concat_tables(tables)
    tiles = _make_tiles(kind, labelled, _read_images(corpus))
    sheet = write_contact_sheet(tiles, target / _SHEET)
    lines = "".join(f"{tile.title}  {tile.text}\n" for tile in tiles[:_PRINTED_ROWS])
    exact = ""
    if kind == "caption":
        equal = sum(
            r["text"] == r["caption"] for r in labelled.select(_CAPTION_COLUMNS).to_pylist()
        )
        exact = f"{equal} of {len(labelled)} captions describe their scene word for word. "
    return (
        f"\nthe first of {sheet}:\n{lines}\n{exact}The embedded store ends with this command: the "
        f"labelled rows are copied to {target}/, images with their texts to {sheet}"
    )


def _read_images(corpus: Store) -> dict[str, bytes]:
    images: dict[str, bytes] = {}
    for info in corpus.list(suffixes=(".parquet",)):
        rows = pq.read_table(io.BytesIO(corpus.get(info.key)), columns=["key", "image"])
        images |= {row["key"]: row["image"]["bytes"] for row in rows.to_pylist()}
    return images


def _make_tiles(kind: Kind, labelled: pa.Table, images: dict[str, bytes]) -> list[Tile]:
    rows = sorted(labelled.to_pylist(), key=lambda row: row["key"])
    step = max(1, len(rows) // _TILES)
    return [_make_tile(kind, row, images[row["key"]]) for row in rows[::step][:_TILES]]


def _make_tile(kind: Kind, row: dict[str, Any], image: bytes) -> Tile:
    failed = row["error_code"] is not None
    text = f"{row['error_code']}: {row['error_message']}" if failed else row["text"]
    if kind == "vqa":
        text = f"{row['question']} {text}"
    kept = f"{row['visual_tokens_kept']}/{row['visual_tokens']} tokens"
    return Tile(
        image=Image.open(io.BytesIO(image)).convert("RGB"),
        title=f"{row['key']}  {kept}",
        text=text,
        failed=failed,
    )
