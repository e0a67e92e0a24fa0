"""Which source column plays which part, and under which name each one is committed."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cluster.config import Kind
from cluster.errors import UsageError
from cluster.schema import source_name

KEY_COLUMNS = ("key", "__key__", "id", "image_id", "question_id")
QUESTION_COLUMNS = ("question", "text_input", "prompt")
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnMapping:
    """The corpus as its readers see it.

    image, key, question: the source columns of those parts (WebDataset finds its own image and
    key). columns: (source column, committed name) of everything that is committed.
    schema: the committed source columns. prompt: what every row is asked, None where rows ask
    their own question.
    """

    columns: tuple[tuple[str, str], ...]
    schema: pa.Schema
    image: str | None = None
    key: str | None = None
    question: str | None = None
    prompt: str | None = None

    def to_dict(self) -> dict[str, Any]:
        schema = base64.b64encode(self.schema.serialize().to_pybytes()).decode()
        return {
            "image": self.image,
            "key": self.key,
            "question": self.question,
            "prompt": self.prompt,
            "columns": [list(pair) for pair in self.columns],
            "schema": schema,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ColumnMapping:
        buffer = pa.py_buffer(base64.b64decode(data["schema"]))
        return cls(
            columns=tuple((source, name) for source, name in data["columns"]),
            schema=pa.ipc.read_schema(buffer),
            image=data["image"],
            key=data["key"],
            question=data["question"],
            prompt=data["prompt"],
        )


def table_mapping(schema: pa.Schema, *, kind: Kind, prompt: str, uri: str) -> ColumnMapping:
    """The mapping of a corpus of tables. Raises UsageError where a needed column is not there.

    Not committed: image bytes (a struct keeps its path), the question of a VQA corpus and a
    string column `key`, which the output's own `question` and `key` hold.
    """
    names = schema.names
    if len(set(names)) != len(names):
        raise UsageError(f"{uri}: two columns share a name among {names}; rename one")
    image = _image_column(schema, uri)
    key = next(
        (name for name in KEY_COLUMNS if name in names and _is_key(schema.field(name))), None
    )
    question = _question_column(schema, uri) if kind == "vqa" else None
    left_out = {question}
    if key in ("key", "__key__") and _is_text(schema.field(key).type):
        left_out.add(key)
    if not pa.types.is_struct(schema.field(image).type):
        left_out.add(image)
    columns = committed_names([name for name in names if name not in left_out], kind)
    return ColumnMapping(
        columns=columns,
        schema=pa.schema(
            [pa.field(name, _nullable(schema.field(source).type)) for source, name in columns]
        ),
        image=image,
        key=key,
        question=question,
        prompt=prompt if kind == "caption" else None,
    )


def committed_names(names: Iterable[str], kind: Kind) -> tuple[tuple[str, str], ...]:
    """Each source column with the name it is committed under; no two are alike."""
    pairs: list[tuple[str, str]] = []
    names = list(names)
    taken = {name for name in names if source_name(name, kind) == name}
    for name in names:
        committed = source_name(name, kind)
        while committed != name and committed in taken:
            committed = f"source_{committed}"
        taken.add(committed)
        pairs.append((name, committed))
    return tuple(pairs)


def difference(first: pa.Schema, other: pa.Schema) -> str | None:
    """How two files' columns differ, or None. Order and metadata do not count."""
    types = {field.name: field.type for field in first}
    others = {field.name: field.type for field in other}
    parts = [f"no {name}" for name in types if name not in others]
    parts += [f"also {name}" for name in others if name not in types]
    parts += [
        f"{name} is {others[name]} instead of {types[name]}"
        for name in types
        if name in others and types[name] != others[name]
    ]
    return ", ".join(parts) or None


def _image_column(schema: pa.Schema, uri: str) -> str:
    found = [field.name for field in schema if _holds_images(field.type)]
    named = [name for known in _IMAGE_COLUMNS for name in found if name.lower() == known]
    if not found:
        raise UsageError(
            f"{uri}: no image column (binary, or struct with bytes) among {_listed(schema)}; "
            "store the encoded images in the files, not their paths"
        )
    return (named or found)[0]


def _question_column(schema: pa.Schema, uri: str) -> str:
    for name in QUESTION_COLUMNS:
        if name in schema.names and _is_text(schema.field(name).type):
            return name
    raise UsageError(
        f"{uri}: no question column ({', '.join(QUESTION_COLUMNS)}) among {_listed(schema)}; "
        "rename yours, or run jobs/caption_corpus.py"
    )


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _nullable(kind: pa.DataType) -> pa.DataType:
    """The type with optional members: rows that could not be read leave them empty."""
    if not pa.types.is_struct(kind):
        return kind
    return pa.struct([field.with_nullable(True) for field in kind])


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_key(field: pa.Field) -> bool:
    return _is_text(field.type) or pa.types.is_integer(field.type)


def _listed(schema: pa.Schema) -> str:
    shown: Sequence[str] = [f"{field.name}: {field.type}" for field in schema]
    return "[" + ", ".join(shown) + "]"
