"""The WebDataset reader: tars in which consecutive members with one key are one sample.

Guarantees: a unit is one byte range of one tar and is read by one ranged request for each
undamaged part; a sample is one row, with a string column for each text extension; each damaged
range is one error row that says which bytes were not read; a refused or oversized sample is an
error row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import structlog

from cluster.config import Kind
from cluster.corpus.columns import ColumnMapping, assign_committed_names
from cluster.corpus.member_roles import find_image, is_text, list_not_copied
from cluster.corpus.table import SourceRow, build_unit_table
from cluster.corpus.tar_header import Member
from cluster.corpus.tar_samples import Sample, read_samples
from cluster.corpus.unit import FileIndex, Unit
from cluster.errors import (
    ArchiveDamaged,
    ArchiveTruncated,
    PromptInvalid,
    ReadError,
    RowError,
    UsageError,
)
from cluster.store import Store

logger = structlog.get_logger(__name__)

QUESTION_MEMBERS = ("question", "question.txt", "json")
"""Extensions that may hold the question of a VQA sample, the preferred first."""
MAX_SAMPLE_BYTES = 256 * 2**20
"""Largest sample that is fetched, bytes; a larger one becomes an error row."""
_SHOWN = 20
# Less the mark that Windows' editors put before a text.
_UTF8 = "utf-8-sig"
_NO_UTF8 = re.compile("[\udc80-\udcff]")  # as surrogateescape decodes it


def map_tar_columns(
    store: Store,
    files: Sequence[FileIndex],
    *,
    kind: Kind,
    prompt: str,
    dotted_keys: bool = False,
) -> ColumnMapping:
    """Maps each text extension of any file to one string column. Raises UsageError for a VQA corpus
    in which no member can hold a question.

    dotted_keys: keys end at the last dot of the file name, as they were indexed.
    """
    seen = {extension for file in files for extension in file.schema.names}
    text = sorted(extension for extension in seen if is_text(extension))
    dropped = list_not_copied(seen)
    if dropped:
        logger.warning("members_not_committed", uri=store.uri, extensions=dropped[:_SHOWN])
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
        dotted_keys=dotted_keys,
    )


def read_tar_unit(store: Store, unit: Unit, mapping: ColumnMapping) -> pa.Table:
    """Reads the unit's rows, with one ranged request for each undamaged part. Raises ReadError
    where they are not as planned, ObjectGone where the object was replaced, StoreError where the
    store gave up."""
    texts: list[dict[str, str]] = []
    rows: list[SourceRow] = []
    for row, text in _read_rows(store, unit, mapping):
        rows.append(row)
        texts.append(text)
    # A row limit leaves more samples in the byte range than rows in the unit, never fewer.
    del rows[unit.row_count - unit.truncated :], texts[unit.row_count - unit.truncated :]
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


def _read_rows(
    store: Store, unit: Unit, mapping: ColumnMapping
) -> Iterator[tuple[SourceRow, dict[str, str]]]:
    """Each row with its text members by extension: the samples of the undamaged parts, and behind
    each part the row of the damage there."""
    assert unit.byte_start is not None
    assert unit.byte_stop is not None
    position = unit.byte_start
    for start, stop, reason in unit.damaged:
        yield from _read_samples(store, unit, mapping, position, start)
        error = ArchiveTruncated(f"bytes {start:,} to {stop:,} of {unit.file} not read: {reason}")
        yield SourceRow(key=f"{unit.file}@{start}", error=error), {}
        position = stop
    yield from _read_samples(store, unit, mapping, position, unit.byte_stop)


def _read_samples(
    store: Store, unit: Unit, mapping: ColumnMapping, start: int, stop: int
) -> Iterator[tuple[SourceRow, dict[str, str]]]:
    """The samples in bytes [start, stop) of the archive, which are all undamaged."""
    size = stop - start
    if size > MAX_SAMPLE_BYTES and unit.row_count == 1 + unit.truncated:
        raise ReadError(f"a sample of {size:,} bytes, more than the limit of {MAX_SAMPLE_BYTES:,}")
    data = memoryview(store.get_range(unit.file, start, stop, etag=unit.etag))

    def read(first: int, last: int) -> bytes:
        return bytes(data[first - start : last - start])

    def content(member: Member) -> bytes:
        return read(member.data_start, member.data_start + member.size)

    def beginning(member: Member, size: int) -> bytes:
        return read(member.data_start, member.data_start + min(size, member.size))

    try:
        for sample in read_samples(read, start, stop, dotted_keys=mapping.dotted_keys):
            image = find_image(sample, beginning)
            row = _build_row(sample, mapping, content, None if image is None else content(image))
            yield row, _read_texts(sample, mapping, content)
    except ArchiveDamaged as error:
        raise ReadError(str(error)) from error


def _build_row(
    sample: Sample,
    mapping: ColumnMapping,
    content: Callable[[Member], bytes],
    image: bytes | None,
) -> SourceRow:
    key = sample.key
    if sample.refused is not None:
        return SourceRow(key=key, error=ReadError(sample.refused))
    prompt = mapping.prompt
    if mapping.question is not None:
        try:
            prompt = _read_question(sample, mapping.question, content)
        except RowError as error:
            return SourceRow(key=key, error=error)
    return SourceRow(key=key, image=image, prompt=prompt)


def _read_question(
    sample: Sample, extension: str, content: Callable[[Member], bytes]
) -> str | None:
    """None where the sample lacks the member. Raises PromptInvalid where it holds no question."""
    member = sample.members.get(extension)
    if member is None:
        return None
    # What is no UTF-8 elsewhere in a record costs no question.
    text = content(member).decode(_UTF8, "surrogateescape")
    question = _read_record(text) if extension == "json" else text
    if _NO_UTF8.search(question):
        raise PromptInvalid("the question is not UTF-8: store it as that")
    return question


def _read_record(text: str) -> str:
    """The question of a `.json` member. Raises PromptInvalid where there is none."""
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
    """The sample's committed text members by extension; none of a refused sample."""
    if sample.refused is not None:
        return {}
    wanted = {source for source, _ in mapping.columns}
    return {
        extension: content(member).decode(_UTF8, "replace")
        for extension, member in sample.members.items()
        if extension in wanted
    }
