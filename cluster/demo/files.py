"""Rows as files: Parquet in the layout of Hugging Face datasets, and WebDataset tars."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import Kind
from cluster.demo.drawn_rows import DrawnRow

GROUP_ROWS = 256

_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
_COLUMNS: dict[Kind, dict[str, pa.DataType]] = {
    "caption": {"caption": pa.string()},
    "vqa": {
        "question": pa.string(),
        "answers": pa.list_(pa.string()),
        "question_type": pa.string(),
    },
}


def encode_parquet(rows: Sequence[DrawnRow], kind: Kind) -> bytes:
    """One Parquet file, with the feature metadata that lets `load_dataset` decode its images."""
    types = {"image": _IMAGE, "key": pa.string(), **_COLUMNS[kind]}
    features: dict[str, object] = {
        name: {"dtype": "string", "_type": "Value"} for name in types if name != "image"
    }
    features["image"] = {"_type": "Image"}
    if kind == "vqa":
        features["answers"] = {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
    ordered = {name: features[name] for name in types}
    metadata = {"huggingface": json.dumps({"info": {"features": ordered}})}
    schema = pa.schema(list(types.items()), metadata=metadata)
    columns = {
        "image": [
            None if row.image is None else {"bytes": row.image, "path": f"{row.key[:100]}.jpg"}
            for row in rows
        ],
        "key": [row.key for row in rows],
        "caption": [row.caption for row in rows],
        "question": [row.question for row in rows],
        "answers": [None if row.answer is None else [row.answer] for row in rows],
        "question_type": [row.question_type for row in rows],
    }
    table = pa.table({name: columns[name] for name in types}, schema=schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=GROUP_ROWS, compression="zstd")
    return buffer.getvalue()


CUT_BYTES = 2 * tarfile.BLOCKSIZE + 100
"""Bytes that an archive with a cut row holds of that row."""


def encode_tar(rows: Sequence[DrawnRow], *, cut: DrawnRow | None = None) -> bytes:
    """One tar archive. With `cut`, that row follows and the archive ends within its image."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for row in rows:
            _add(archive, row)
        whole = archive.offset
        if cut is not None:
            _add(archive, cut)
    if cut is None:
        return buffer.getvalue()
    return buffer.getvalue()[: whole + CUT_BYTES]


def _add(archive: tarfile.TarFile, row: DrawnRow) -> None:
    for extension, data in _members(row):
        member = tarfile.TarInfo(f"{row.key}.{extension}")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


def _members(row: DrawnRow) -> Iterator[tuple[str, bytes]]:
    if row.image is not None:
        yield "jpg", row.image
    facts = {
        "key": row.key,
        "caption": row.caption,
        "question": row.question,
        "answers": None if row.answer is None else [row.answer],
        "question_type": row.question_type,
    }
    record = {name: value for name, value in facts.items() if value is not None}
    yield "json", json.dumps(record, ensure_ascii=False).encode()
    reference = row.caption if row.caption is not None else row.answer
    yield "txt", (reference or "").encode()
