"""WebDataset corpora: tars of consecutive members that share a key, one unit a range of one tar."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pyarrow as pa
import structlog

from cluster.config import Kind
from cluster.corpus.columns import ColumnMapping, committed_names
from cluster.corpus.table import SourceRow, unit_table
from cluster.corpus.tar import Member, Sample, samples
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
TEXT_EXTENSIONS = frozenset(
    "answer answers caption cls cls2 count id idx index json label question tags text transcript "
    "txt url".split()
)
QUESTION_MEMBERS = ("question", "question.txt", "json")
# One read of the plan's walk over headers: far above a typical member, so that an archive of
# small ones is read in few requests; the data of larger ones is skipped.
_WALK_BYTES = 4 * 2**20
# A sample beyond this is not fetched: it becomes an error row.
MAX_SAMPLE_BYTES = 256 * 2**20


def index_tar(store: Store, info: ObjectInfo, *, unit_rows: int, unit_bytes: int) -> FileIndex:
    """Walks the archive's headers once. Damage ends it with one more row, for the archive."""
    file = RangedFile(store, info, window=_WALK_BYTES)
    ranges: list[tuple[int, int, int]] = []  # rows, start, stop
    extensions: set[str] = set()
    damage: ArchiveDamaged | None = None
    try:
        for sample in samples(file.window, 0, info.size, ends=True):
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
        where = {"row_start": first, "row_count": count, "size_bytes": stop - start}
        flag = {"truncated": True} if truncated else {}
        units.append(
            make_unit("webdataset", info, **where, **flag, byte_start=start, byte_stop=stop)
        )
        first += count
    schema = pa.schema([pa.field(name, pa.binary()) for name in sorted(extensions)])
    return FileIndex(info=info, units=tuple(units), schema=schema)


def tar_mapping(
    store: Store, files: Sequence[FileIndex], *, kind: Kind, prompt: str
) -> ColumnMapping:
    """One string column per text extension seen. Raises UsageError where no question can be."""
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
    columns = committed_names([name for name in text if name != question or name == "json"], kind)
    return ColumnMapping(
        columns=columns,
        schema=pa.schema([pa.field(name, pa.string()) for _, name in columns]),
        question=question,
        prompt=prompt if kind == "caption" else None,
    )


def read_tar_unit(store: Store, unit: Unit, mapping: ColumnMapping) -> pa.Table:
    """The unit's rows, from one ranged read. Raises ReadError where they are not as planned."""
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
        return read(member.data, member.data + member.size)

    try:
        found = list(samples(read, offset, unit.byte_stop, ends=False))
    except ArchiveDamaged as error:
        raise ReadError(str(error)) from error
    # A limit may end the unit in the middle of a planned range; never the other way round.
    found = found[: unit.row_count - unit.truncated]
    texts = [_texts(sample, mapping, content) for sample in found]
    rows = [_row(sample, text, mapping, content) for sample, text in zip(found, texts, strict=True)]
    if unit.truncated:
        rest = ArchiveTruncated(f"{unit.file} breaks off after row {unit.row_start + len(rows)}")
        rows.append(SourceRow(key=unit.file, error=rest))
        texts.append({})
    if len(rows) != unit.row_count:
        raise ReadError(f"{len(rows)} rows where {unit.row_count} were planned")
    columns = [
        pa.array([text.get(source) for text in texts], pa.string()) for source, _ in mapping.columns
    ]
    return unit_table(unit, mapping, rows, columns)


def _row(
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
        prompt = mapping.prompt if mapping.question is None else _question(texts, mapping.question)
    except RowError as error:
        return SourceRow(key=key, error=error)
    return SourceRow(key=key, image=content(images[0]) if images else None, prompt=prompt)


def _question(texts: dict[str, str], member: str) -> str | None:
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


def _texts(
    sample: Sample, mapping: ColumnMapping, content: Callable[[Member], bytes]
) -> dict[str, str]:
    """The sample's text members; of a refused sample nothing is read."""
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
