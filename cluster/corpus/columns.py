"""Column mapping: the role of each source column, and the name it is committed under.

Guarantees: one mapping holds for every file of a corpus; committed names are unique and never
equal an output column; a mapping survives its JSON, so a resumed run reads as it was planned.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cluster.config import Kind
from cluster.corpus.types import is_binary, is_string, plain_type
from cluster.errors import UsageError
from cluster.schema import is_reserved

KEY_COLUMNS: Mapping[Kind, tuple[str, ...]] = {
    "caption": ("key", "__key__", "id", "image_id", "question_id"),
    "vqa": ("key", "__key__", "id", "question_id", "image_id"),
}
"""Names of key columns, the preferred first: of several questions about one image, each has its own
key. A key is a string or an integer."""
QUESTION_COLUMNS = ("question", "text_input", "prompt")
"""Names of question columns, the preferred first."""
_NO_FOLDERS = pa.schema([])
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnMapping:
    """Which source columns hold image, key and question, and which are committed."""

    columns: tuple[tuple[str, str], ...]
    """(source column, committed name) of each committed column, in the order of `schema`."""
    schema: pa.Schema
    """Committed names and types of `columns`."""
    image: str | None = None
    """Source column of the image; None in WebDataset, where the extension identifies it."""
    key: str | None = None
    """Source column of the key; None where rows are keyed by file and position, and in WebDataset,
    where the member name holds the key."""
    question: str | None = None
    """Source column of the question; None for captions."""
    prompt: str | None = None
    """Prompt of every row; None where each row has its own question."""
    dotted_keys: bool = False
    """WebDataset: a key ends at the last dot of the file name, not at the first."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest. The schema is base64 of its Arrow IPC message."""
        schema = base64.b64encode(self.schema.serialize().to_pybytes()).decode()
        return {
            "image": self.image,
            "key": self.key,
            "question": self.question,
            "prompt": self.prompt,
            "columns": [list(pair) for pair in self.columns],
            "schema": schema,
            **({"dotted_keys": True} if self.dotted_keys else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ColumnMapping:
        """The inverse of `to_dict`. Raises ValueError, KeyError or TypeError on anything else."""
        buffer = pa.py_buffer(base64.b64decode(data["schema"]))
        return cls(
            columns=tuple((source, name) for source, name in data["columns"]),
            schema=pa.ipc.read_schema(buffer),
            image=data["image"],
            key=data["key"],
            question=data["question"],
            prompt=data["prompt"],
            dotted_keys=data.get("dotted_keys", False),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnChoice:
    """Columns that a user names, where their names or types do not tell which they are."""

    image: str | None = None
    """--image-column."""
    key: str | None = None
    """--key."""
    question: str | None = None
    """--question-column."""


def map_table_columns(
    schema: pa.Schema,
    *,
    kind: Kind,
    prompt: str,
    uri: str,
    folders: pa.Schema = _NO_FOLDERS,
    choice: ColumnChoice | None = None,
    looks_like_images: Callable[[str], bool] = lambda name: True,
) -> ColumnMapping:
    """Maps a corpus of tables. Raises UsageError where a required column is missing, or where
    several could be meant.

    folders: columns that files have in the names of their folders. Such a value is that of all rows
    of a file, which tells none of them: it is committed, whatever it is called, and never image,
    key or question. looks_like_images: whether the first values of a column begin as images do;
    asked where names do not tell. Three columns of files are not committed: image bytes (of a
    struct, the other fields stay), the question of a VQA corpus and a string column `key`. The last
    two are in the output's own `question` and `key`.
    """
    choice = choice or ColumnChoice()
    image = _find_image_column(schema, uri, choice.image, looks_like_images)
    key = _find_key_column(schema, uri, choice.key, kind)
    question = _find_question_column(schema, uri, choice.question) if kind == "vqa" else None
    dropped = {question}
    if key in ("key", "__key__") and is_string(schema.field(key).type):
        dropped.add(key)
    if not pa.types.is_struct(schema.field(image).type):
        dropped.add(image)
    kept = {field.name: field.type for field in schema if field.name not in dropped}
    for field in folders:
        kept[field.name] = field.type
    columns = assign_committed_names(kept, kind)
    return ColumnMapping(
        columns=columns,
        schema=pa.schema([(name, plain_type(kept[source])) for source, name in columns]),
        image=image,
        key=key,
        question=question,
        prompt=prompt if kind == "caption" else None,
    )


def assign_committed_names(names: Iterable[str], kind: Kind) -> tuple[tuple[str, str], ...]:
    """Pairs each source column with its committed name, its own or `source_<name>`. Committed names
    are unique, and differ in more than case: engines that ignore it could not tell them apart."""
    pairs: list[tuple[str, str]] = []
    names = list(names)
    keep: dict[str, str] = {}  # the first of the names that differ in case alone keeps its own
    for name in names:
        if not is_reserved(name, kind):
            keep.setdefault(name.lower(), name)
    taken = set(keep)
    for name in names:
        committed = name
        if keep.get(name.lower()) != name:
            committed = f"source_{name}"
            while committed.lower() in taken:
                committed = f"source_{committed}"
            taken.add(committed.lower())
        pairs.append((name, committed))
    return tuple(pairs)


def _find_image_column(
    schema: pa.Schema, uri: str, chosen: str | None, looks_like_images: Callable[[str], bool]
) -> str:
    candidates = [field.name for field in schema if _holds_images(field.type)]
    if chosen is not None:
        if chosen not in candidates:
            raise UsageError(
                f"{uri}: --image-column {chosen} is no column of encoded images (binary, or struct "
                f"with bytes) among {_format_columns(schema)}"
            )
        return chosen
    if not candidates:
        raise UsageError(
            f"{uri}: no image column (binary, or struct with bytes) among "
            f"{_format_columns(schema)}; store the encoded images in the files, not their paths"
        )
    named = [name for known in _IMAGE_COLUMNS for name in candidates if name.lower() == known]
    if named:
        return named[0]
    found = [name for name in candidates if looks_like_images(name)]
    if len(found) != 1:
        raise UsageError(
            f"{uri}: {'none' if not found else 'several'} of the binary columns "
            f"{', '.join(found or candidates)} hold{'s' if not found else ''} images; name the one "
            "that is meant: --image-column COLUMN"
        )
    return found[0]


def _find_key_column(schema: pa.Schema, uri: str, chosen: str | None, kind: Kind) -> str | None:
    """None where the source has no keys."""
    usable = [field.name for field in schema if _can_be_key(field.type)]
    if chosen is not None:
        if chosen not in usable:
            raise UsageError(
                f"{uri}: --key {chosen} is no column of strings or integers among "
                f"{_format_columns(schema)}"
            )
        return chosen
    return next((name for name in KEY_COLUMNS[kind] if name in usable), None)


def _find_question_column(schema: pa.Schema, uri: str, chosen: str | None) -> str:
    for name in QUESTION_COLUMNS if chosen is None else (chosen,):
        if name in schema.names and is_string(schema.field(name).type):
            return name
    if chosen is not None:
        raise UsageError(
            f"{uri}: --question-column {chosen} is no column of strings among "
            f"{_format_columns(schema)}"
        )
    raise UsageError(
        f"{uri}: no question column ({', '.join(QUESTION_COLUMNS)}) among "
        f"{_format_columns(schema)}; name yours with --question-column COLUMN, or run "
        "jobs/caption_corpus.py"
    )


def _holds_images(kind: pa.DataType) -> bool:
    """Whether a column can hold an encoded image a row: bytes, a struct with bytes, or a list of
    either (of one image; a row with more becomes an error row)."""
    kind = plain_type(kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and is_binary(kind.field(index).type)
    return is_binary(kind)


def _can_be_key(kind: pa.DataType) -> bool:
    return is_string(kind) or pa.types.is_integer(kind)


def _format_columns(schema: pa.Schema) -> str:
    return "[" + ", ".join(f"{field.name}: {field.type}" for field in schema) + "]"
