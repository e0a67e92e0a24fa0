"""The WebDataset reader: tars in which consecutive members with one key are one sample.

Guarantees: a unit is one byte range of one tar and is read by one ranged request; a sample is one
row, with a string column for each text extension; a damaged archive keeps the samples known to be
complete and adds one error row; a refused or oversized sample is an error row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pyarrow as pa
import structlog

from cluster.config import Kind
from cluster.corpus.columns import ColumnMapping, assign_committed_names
from cluster.corpus.table import SourceRow, build_unit_table
from cluster.corpus.tar import Member, Sample, read_samples
from cluster.corpus.unit import FileIndex, Unit, make_unit
from cluster.errors import (
    ArchiveDamaged,
    ArchiveTruncated,
    PromptInvalid,
    ReadError,
    RowError,
    UsageError,
)
from cluster.store import ObjectInfo, RangedFile, Store

logger = structlog.get_logger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of images, the preferred first; one image per sample is used."""
TEXT_EXTENSIONS = frozenset(
    "answer answers caption cls cls2 count id idx index json label question tags text transcript "
    "txt url".split()
)
"""Last parts of extensions whose members are committed as string columns."""
QUESTION_MEMBERS = ("question", "question.txt", "json")
"""Extensions that may hold the question of a VQA sample, the preferred first."""
MAX_SAMPLE_BYTES = 256 * 2**20
"""Largest sample that is fetched, bytes; a larger one becomes an error row."""
# One request while indexing. Far above a typical member, so that small members share a request;
# the data of larger members is skipped.
_INDEX_READ_BYTES = 4 * 2**20


def index_tar(store: Store, info: ObjectInfo, *, unit_rows: int, unit_bytes: int) -> FileIndex:
    """Indexes one tar from its headers: its extensions, and its units of up to `unit_rows` rows and
    `unit_bytes` bytes. Damage ends the index with one additional row, which stands for the rest of
    the archive."""
    file = RangedFile(store, info, window=_INDEX_READ_BYTES)
    ranges: list[tuple[int, int, int]] = []  # rows, start, stop
    extensions: set[str] = set()
    damage: ArchiveDamaged | None = None
    try:
        for sample in read_samples(file.read_range, 0, info.size, expect_end_mark=True):
            extensions.update(sample.members)
            rows, start, _ = ranges[-1] if ranges else (unit_rows, 0, 0)
            if rows >= unit_rows or sample.stop - start > unit_bytes:
                ranges.append((1, sample.start, sample.stop))
            else:
                ranges[-1] = (rows + 1, start, sample.stop)
    except ArchiveDamaged as error:
        damage = error
        logger.warning("archive_truncated", uri=store.uri_of(info.key), reason=str(error))
        if not ranges:
            ranges.append((0, 0, 0))
    units: list[Unit] = []
    first = 0
    for number, (rows, start, stop) in enumerate(ranges):
        truncated = damage is not None and number == len(ranges) - 1
        count = rows + truncated
        position = {"row_start": first, "row_count": count, "size_bytes": stop - start}
        flag = {"truncated": True} if truncated else {}
        units.append(
            make_unit("webdataset", info, **position, **flag, byte_start=start, byte_stop=stop)
        )
        first += count
    schema = pa.schema([pa.field(name, pa.binary()) for name in sorted(extensions)])
    return FileIndex(info=info, units=tuple(units), schema=schema)


def map_tar_columns(
    store: Store, files: Sequence[FileIndex], *, kind: Kind, prompt: str
) -> ColumnMapping:
    """Maps each text extension of any file to one string column. Raises UsageError for a VQA corpus
    in which no member can hold a question."""
    seen = {extension for file in files for extension in file.schema.names}
    text = sorted(extension for extension in seen if _is_text(extension))
    dropped = sorted(seen - set(text) - set(IMAGE_EXTENSIONS) - {""})
    if dropped:
        logger.warning("members_not_committed", uri=store.uri, extensions=dropped)
    question = None
    if kind == "vqa":
        question = next((name for name in QUESTION_MEMBERS if name in seen), None)
        if question is None:
            raise UsageError(
                f"{store.uri}: no member {', '.join(QUESTION_MEMBERS)} among the extensions "
                f"{sorted(seen)}; give each sample a .json with its question"
            )
    kept = [name for name in text if name != question or name == "json"]
    columns = assign_committed_names(kept, kind)
    return ColumnMapping(
        columns=columns,
        schema=pa.schema([pa.field(name, pa.string()) for _, name in columns]),
        question=question,
        prompt=prompt if kind == "caption" else None,
    )


def read_tar_unit(store: Store, unit: Unit, mapping: ColumnMapping) -> pa.Table:
    """Reads the unit's rows with one ranged request. Raises ReadError where they are not as
    planned, ObjectGone where the object was replaced, StoreError where the store gave up."""
    assert unit.byte_start is not None
    assert unit.byte_stop is not None
    size = unit.byte_stop - unit.byte_start
    if size > MAX_SAMPLE_BYTES and unit.row_count == 1 + unit.truncated:
        raise ReadError(f"a sample of {size:,} bytes, more than the limit of {MAX_SAMPLE_BYTES:,}")
    offset = unit.byte_start
    data = memoryview(store.get_range(unit.file, offset, unit.byte_stop, etag=unit.etag))

    def read(start: int, stop: int) -> bytes:
        return bytes(data[start - offset : stop - offset])

    def content(member: Member) -> bytes:
        return read(member.data_start, member.data_start + member.size)

    try:
        found = list(read_samples(read, offset, unit.byte_stop, expect_end_mark=False))
    except ArchiveDamaged as error:
        raise ReadError(str(error)) from error
    # A row limit leaves more samples in the byte range than rows in the unit, never fewer.
    found = found[: unit.row_count - unit.truncated]
    texts = [_read_texts(sample, mapping, content) for sample in found]
    rows = [
        _build_row(sample, text, mapping, content)
        for sample, text in zip(found, texts, strict=True)
    ]
    if unit.truncated:
        truncation = ArchiveTruncated(
            f"{unit.file} is damaged or truncated after its first {unit.row_start + len(rows)} rows"
        )
        rows.append(SourceRow(key=unit.file, error=truncation))
        texts.append({})
    if len(rows) != unit.row_count:
        raise ReadError(f"{len(rows)} rows where {unit.row_count} were planned")
    columns = [
        pa.array([text.get(source) for text in texts], pa.string()) for source, _ in mapping.columns
    ]
    return build_unit_table(unit, mapping, rows, columns)


def _build_row(
    sample: Sample,
    texts: dict[str, str],
    mapping: ColumnMapping,
    content: Callable[[Member], bytes],
) -> SourceRow:
    key = sample.key
    if sample.refused is not None:
        return SourceRow(key=key, error=ReadError(sample.refused))
    images = [sample.members[name] for name in IMAGE_EXTENSIONS if name in sample.members]
    try:
        prompt = (
            mapping.prompt if mapping.question is None else _read_question(texts, mapping.question)
        )
    except RowError as error:
        return SourceRow(key=key, error=error)
    return SourceRow(key=key, image=content(images[0]) if images else None, prompt=prompt)


def _read_question(texts: dict[str, str], member: str) -> str | None:
    text = texts.get(member)
    if text is None or member != "json":
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptInvalid(f"the .json member is not JSON: {error}"[:300]) from error
    question = record.get("question") if isinstance(record, dict) else None
    if not isinstance(question, str):
        raise PromptInvalid("the .json member has no string `question`")
    return question


def _read_texts(
    sample: Sample, mapping: ColumnMapping, content: Callable[[Member], bytes]
) -> dict[str, str]:
    """The sample's text members by extension; none of a refused sample."""
    if sample.refused is not None:
        return {}
    wanted = {source for source, _ in mapping.columns} | {mapping.question}
    return {
        extension: content(member).decode("utf-8", "replace")
        for extension, member in sample.members.items()
        if extension in wanted
    }


def _is_text(extension: str) -> bool:
    return extension.rpartition(".")[2] in TEXT_EXTENSIONS
