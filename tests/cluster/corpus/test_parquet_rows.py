"""Rows of Parquet units: as many as planned, whatever the bytes; a row group is decoded once."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.corpus.packed import unpack_units
from cluster.corpus.parquet import index_parquet, map_parquet_columns
from cluster.corpus.parquet_rows import Footers, _RowGroup, read_parquet_units
from cluster.corpus.source import UnitSource, _last_word, _read_blocks, read_unit
from cluster.corpus.table import input_rows
from cluster.corpus.unit import Unit, join_units
from cluster.errors import ObjectGone, StoreError
from cluster.output.manifest import Manifest
from cluster.schema import input_schema
from cluster.store import Store, open_store
from tests.cluster.corpora import IMAGE, CountingStore, image, plan, put_parquet, read_all

SHAPES: dict[str, Any] = {
    "binary": lambda data: pa.array(data, pa.binary()),
    "large_binary": lambda data: pa.array(data, pa.large_binary()),
    "binary_view": lambda data: pa.array(data, pa.binary_view()),
    "dictionary": lambda data: pa.array(data, pa.binary()).dictionary_encode(),
    "struct": lambda data: pa.array([image(d) for d in data], IMAGE),
    "struct of views": lambda data: pa.array(
        [image(d) for d in data],
        pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]),
    ),
    "list of one": lambda data: pa.array([[d] for d in data], pa.list_(pa.binary())),
    "list of structs": lambda data: pa.array([[image(d)] for d in data], pa.list_(IMAGE)),
}


@pytest.fixture
def corpus(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "in"))


def images_of(table: pa.Table) -> list[bytes | None]:
    return [row["_in_image"] for row in input_rows(table)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("repeat", [False, True])
def test_images_are_read_from_every_shape_of_column(
    corpus: Store, tmp_path: Path, shape: str, repeat: bool
) -> None:
    data = [b"same" * 100] * 9 if repeat else [b"image %d" % n for n in range(9)]
    # Arrow cannot yet write parts of a struct of views.
    group_rows = 9 if shape == "struct of views" else 4
    table = pa.table({"image": SHAPES[shape](data)})
    put_parquet(corpus, "a.parquet", table, group_rows=group_rows)
    read = read_all(plan(corpus.uri, str(tmp_path / "out"), unit_rows=3))
    assert images_of(read) == data


def test_a_row_of_several_images_is_an_error_row(corpus: Store, tmp_path: Path) -> None:
    rows = pa.array([[b"one"], [b"one", b"two"], [], None], pa.list_(pa.binary()))
    put_parquet(corpus, "a.parquet", pa.table({"image": rows}))
    read = read_all(plan(corpus.uri, str(tmp_path / "out")))
    codes = [None, "read_failed", "image_missing", "image_missing"]
    assert read["_in_error_code"].to_pylist() == codes
    assert read["_in_error_message"][1].as_py() == "2 images in one row, where one is labelled"


def test_a_shard_in_which_no_row_has_an_image_keeps_its_keys_and_columns(
    corpus: Store, tmp_path: Path
) -> None:
    """Its writer knew no type for the column."""
    columns = {"key": ["a0", "a1"], "note": ["x", None]}
    put_parquet(corpus, "a.parquet", pa.table({"image": pa.nulls(2), **columns}))
    put_parquet(corpus, "b.parquet", pa.table({"image": [image()], "key": ["b0"], "note": ["y"]}))
    read = read_all(plan(corpus.uri, str(tmp_path / "out")))
    assert read["_in_error_code"].to_pylist() == ["image_missing", "image_missing", None]
    assert read["_in_key"].to_pylist() == ["a0", "a1", "b0"]
    assert read["note"].to_pylist() == ["x", None, "y"]
    assert read["image"].to_pylist() == [None, None, image(None)]


PATHS: dict[str, Any] = {
    "struct": lambda data: pa.array([image(None, path) for path in data], IMAGE),
    "struct of views": lambda data: pa.array(
        [image(None, path) for path in data],
        pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]),
    ),
    "list of structs": lambda data: pa.array([[image(None, path)] for path in data]).cast(
        pa.list_(IMAGE)
    ),
    "struct without bytes": lambda data: pa.array([{"path": path} for path in data]),
}


@pytest.mark.parametrize("shape", PATHS)
def test_the_error_of_a_row_with_its_images_path_alone_has_the_path_and_what_to_do(
    corpus: Store, tmp_path: Path, shape: str
) -> None:
    """Dictionary entries too: paths that repeat are read as those."""
    paths = ["train/7.jpg"] * 50 + ["", None, "p" * 5_000]
    put_parquet(corpus, "a.parquet", pa.table({"image": PATHS[shape](paths)}))
    kind = pa.list_(IMAGE) if shape == "list of structs" else IMAGE
    good = [[image()]] if shape == "list of structs" else [image()]
    put_parquet(corpus, "b.parquet", pa.table({"image": pa.array(good, kind)}))
    read = read_all(plan(corpus.uri, str(tmp_path / "out")))
    assert read["_in_error_code"].to_pylist() == ["image_missing"] * 53 + [None]
    messages = read["_in_error_message"].to_pylist()
    assert "only its path 'train/7.jpg'" in messages[0]
    assert "push_to_hub(embed_external_files=True)" in messages[49]
    assert messages[50:52] == ["the row has no image"] * 2
    assert 200 < len(messages[52]) < 400


def test_a_path_that_is_not_utf8_beside_no_image_costs_its_own_row_alone(
    corpus: Store, tmp_path: Path
) -> None:
    paths = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"R\xc9U", b"c"]).buffers())
    nothing = pa.nulls(3, pa.binary())
    images = pa.StructArray.from_arrays([nothing, paths], fields=list(IMAGE))
    put_parquet(corpus, "a.parquet", pa.table({"image": images, "key": ["k0", "k1", "k2"]}))
    read = read_all(plan(corpus.uri, str(tmp_path / "out")))
    codes = ["image_missing", "read_failed", "image_missing"]
    assert read["_in_error_code"].to_pylist() == codes
    assert read["_in_key"].to_pylist() == ["k0", "k1", "k2"]


def test_rows_that_share_an_image_share_its_memory(corpus: Store, tmp_path: Path) -> None:
    """What is once in the file is planned as one image and held as a few, not as 200."""
    picture = os.urandom(2**18)
    put_parquet(corpus, "a.parquet", pa.table({"image": pa.array([picture] * 200, pa.binary())}))
    planned = plan(corpus.uri, str(tmp_path / "out"))
    (unit,) = planned.units
    before = pa.total_allocated_bytes()
    read = read_unit(corpus, unit, planned.manifest.mapping)
    assert pa.total_allocated_bytes() - before < 20 * len(picture)
    assert unit.size_bytes < 2 * len(picture)
    rows = input_rows(read)
    assert {id(row["_in_image"]) for row in rows} == {id(rows[0]["_in_image"])}
    assert rows[0]["_in_image"] == picture


@pytest.mark.parametrize(("group_rows", "tasks"), [(80, 1), (20, 4)])
def test_a_row_group_of_many_units_is_read_once(
    corpus: Store, tmp_path: Path, group_rows: int, tasks: int
) -> None:
    noise = [image(os.urandom(50_000)) for _ in range(80)]
    table = pa.table({"image": pa.array(noise, IMAGE)})
    put_parquet(corpus, "a.parquet", table, group_rows=group_rows)
    planned = plan(corpus.uri, str(tmp_path / "out"), unit_rows=2)
    mapping = planned.manifest.mapping
    counting = CountingStore(corpus)
    grouped = UnitSource(corpus.uri, mapping, planned.units).tasks
    assert len(grouped) == tasks
    packed = [
        block
        for units in grouped
        for block in _read_blocks(counting, units, mapping)  # type: ignore[arg-type]
    ]
    read = [table for block in packed for table in unpack_units(block)]
    assert [len(table) for table in read] == [2] * 40
    assert [i for table in read for i in images_of(table)] == [value["bytes"] for value in noise]
    assert counting.fetched < 1.5 * planned.units[0].file_size + 2**18 * tasks


def test_a_unit_of_large_images_is_read_without_its_neighbours(
    corpus: Store, tmp_path: Path
) -> None:
    """A batch of as many rows as units usually have would hold gigabytes of 5 MB images."""
    noise = [image(os.urandom(400_000)) for _ in range(100)]
    buffer = io.BytesIO()  # of pages of an image: a page is always read as a whole
    table = pa.table({"image": pa.array(noise, IMAGE)})
    pq.write_table(table, buffer, write_batch_size=1, data_page_size=1, use_dictionary=False)
    corpus.put("a.parquet", buffer.getvalue())
    planned = plan(corpus.uri, str(tmp_path / "out"), unit_bytes=900_000)
    assert {unit.row_count for unit in planned.units} == {2}
    before, peak = pa.total_allocated_bytes(), 0
    counting = CountingStore(corpus)
    for block in _read_blocks(counting, planned.units, planned.manifest.mapping):  # type: ignore[arg-type]
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert len(block) == 1
    assert peak < 15_000_000, "of 40 MB in the row group, 8 of them read ahead"
    # What a store returns lies outside Arrow's memory.
    assert counting.largest <= 9_000_000


def test_the_last_unit_of_a_row_group_is_read_alone_without_the_rows_before_it(
    corpus: Store, tmp_path: Path
) -> None:
    """As where an attempt is resumed: the unit ends where the row group does."""
    noise = [image(os.urandom(400_000)) for _ in range(100)]
    buffer = io.BytesIO()
    table = pa.table({"image": pa.array(noise, IMAGE)})
    pq.write_table(table, buffer, write_batch_size=1, data_page_size=1, use_dictionary=False)
    corpus.put("a.parquet", buffer.getvalue())
    planned = plan(corpus.uri, str(tmp_path / "out"), unit_bytes=900_000)
    before = pa.total_allocated_bytes()
    tables = read_parquet_units(Footers(corpus), planned.units[-1:], planned.manifest.mapping)
    read = next(tables)  # which still holds what it was taken from
    assert pa.total_allocated_bytes() - before < 15_000_000, "of 40 MB in the row group"
    assert images_of(read) == [value["bytes"] for value in noise[98:]]


def test_planning_looks_at_the_first_images_alone(corpus: Store, tmp_path: Path) -> None:
    noise = [b"\xff\xd8\xff" + os.urandom(400_000) for _ in range(50)]
    buffer = io.BytesIO()
    table = pa.table({"content": noise})
    pq.write_table(table, buffer, write_batch_size=1, data_page_size=1, use_dictionary=False)
    corpus.put("a.parquet", buffer.getvalue())
    counting = CountingStore(corpus)
    index = index_parquet(counting, corpus.list()[0], unit_rows=10, unit_bytes=2**30)  # type: ignore[arg-type]
    mapping = map_parquet_columns(counting, [index], kind="caption", prompt="p")  # type: ignore[arg-type]
    assert mapping.image == "content"
    assert counting.fetched < 6_000_000, "of 20 MB"


def test_a_batch_that_cannot_be_made_costs_no_row_and_not_the_units_behind_it(
    corpus: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow gives no batch of more than 2 GB of nested values, and every row of it by itself."""
    put_parquet(corpus, "a.parquet", pa.table({"image": [image(b"%d" % n) for n in range(12)]}))
    planned = plan(corpus.uri, str(tmp_path / "out"), unit_rows=3)
    open_rows = _RowGroup._open

    def too_large(group: _RowGroup, rows: int, until: int | None) -> Iterator[pa.RecordBatch]:
        for number, batch in enumerate(open_rows(group, rows, until)):
            if rows > 1 and number == 1:
                raise pa.ArrowNotImplementedError("nested data of chunked arrays")
            yield batch

    monkeypatch.setattr(_RowGroup, "_open", too_large)
    blocks = _read_blocks(corpus, planned.units, planned.manifest.mapping)
    read = [table for block in blocks for table in unpack_units(block)]
    assert [i for table in read for i in images_of(table)] == [b"%d" % n for n in range(12)]


def test_units_that_do_not_end_where_batches_end(corpus: Store, tmp_path: Path) -> None:
    """Thousands of them in one row group, a few left out, as at a resume."""
    rows = 30_000
    put_parquet(
        corpus, "a.parquet", pa.table({"image": pa.array([b"x"] * rows), "key": range(rows)}),
        group_rows=rows,
    )  # fmt: skip
    planned = plan(corpus.uri, str(tmp_path / "out"), unit_rows=7)
    footers, mapping = Footers(corpus), planned.manifest.mapping
    group = _RowGroup(footers, [*planned.units[:2], planned.units[-1]], mapping)
    group._batch_rows = 5  # of no unit's size
    for first in range(0, rows - 7, 14):
        table, reason = group.read(first, 7)
        assert reason == ""
        assert table is not None
        assert table["key"].to_pylist() == list(range(first, first + 7))


def test_a_task_reads_the_units_that_are_left_of_a_row_group(corpus: Store, tmp_path: Path) -> None:
    put_parquet(corpus, "a.parquet", pa.table({"image": [image(b"%d" % n) for n in range(9)]}))
    planned = plan(corpus.uri, str(tmp_path / "out"), unit_rows=2)
    left = [planned.units[1], planned.units[4]]
    blocks = _read_blocks(corpus, left, planned.manifest.mapping)
    read = [table for block in blocks for table in unpack_units(block)]
    assert [images_of(table) for table in read] == [[b"2", b"3"], [b"8"]]


def test_small_row_groups_and_small_files_share_units(corpus: Store, tmp_path: Path) -> None:
    for name in "abc":
        rows = [image(f"{name}{n}".encode()) for n in range(100)]
        put_parquet(corpus, f"{name}.parquet", pa.table({"image": rows}), group_rows=1)
    planned = plan(corpus.uri, str(tmp_path / "out"), unit_rows=256)
    assert [unit.row_count for unit in planned.units] == [256, 44]
    read = read_all(planned)
    assert images_of(read) == [f"{name}{n}".encode() for name in "abc" for n in range(100)]
    assert read["_in_key"][123].as_py() == "b.parquet#23"
    assert read["_in_row"].to_pylist() == [*range(256), *range(44)]
    assert read["_in_unit"].unique().to_pylist() == [unit.unit_id for unit in planned.units]
    assert Manifest.from_json(planned.manifest.to_json()) == planned.manifest


def test_a_limit_cuts_a_unit_of_several_parts(corpus: Store, tmp_path: Path) -> None:
    rows = [image(b"%d" % n) for n in range(20)]
    put_parquet(corpus, "a.parquet", pa.table({"image": rows}), group_rows=3)
    planned = plan(corpus.uri, str(tmp_path / "out"), limit=11)
    assert planned.manifest.rows == 11
    assert images_of(read_all(planned)) == [b"%d" % n for n in range(11)]


def test_one_damaged_part_costs_its_own_rows(corpus: Store, tmp_path: Path) -> None:
    for name in "abc":
        put_parquet(corpus, f"{name}.parquet", pa.table({"image": [image()] * 2}))
    planned = plan(corpus.uri, str(tmp_path / "out"))
    put_parquet(corpus, "b.parquet", pa.table({"image": [image(b"changed")] * 2}))
    read = read_all(planned)
    failed = ["read_failed"] * 2
    assert read["_in_error_code"].to_pylist() == [None, None, *failed, None, None]
    assert read["_in_key"].to_pylist()[2:4] == ["b.parquet#0", "b.parquet#1"]


def test_rows_before_a_damaged_page_are_read(corpus: Store, tmp_path: Path) -> None:
    """Only the page's checksum tells that a bit of an image has flipped."""
    buffer = io.BytesIO()
    table = pa.table({"image": pa.array([os.urandom(2_000) for _ in range(64)], pa.binary())})
    pages = {"data_page_size": 8_000, "write_batch_size": 4, "write_page_checksum": True}
    pq.write_table(table, buffer, use_dictionary=False, **pages)
    data = bytearray(buffer.getvalue())
    data[len(data) // 2 + 3_000] ^= 1
    corpus.put("a.parquet", bytes(data))
    codes = read_all(plan(corpus.uri, str(tmp_path / "out")))["_in_error_code"].to_pylist()
    good = codes.index("read_failed")
    assert good == 32
    assert codes == [None] * good + ["read_failed"] * (64 - good)


class _Gone:
    """A store of a node that lacks the mount."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        raise ObjectGone(f"{key} is gone")


@pytest.mark.usefixtures("local_ray")
def test_an_object_that_is_gone_here_is_looked_for_a_second_time(
    corpus: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_parquet(corpus, "a.parquet", pa.table({"image": [image(b"there")] * 2}))
    planned = plan(corpus.uri, str(tmp_path / "out"))
    mapping = planned.manifest.mapping
    asked: list[Sequence[Unit]] = []

    def elsewhere(store: Store, units: Sequence[Unit], _: object) -> list[pa.Table]:
        asked.append(units)
        return [read_unit(corpus, unit, mapping) for unit in units]

    monkeypatch.setattr("cluster.corpus.source._ask_elsewhere", elsewhere)
    (block,) = _read_blocks(_Gone(corpus), planned.units, mapping)  # type: ignore[arg-type]
    (read,) = unpack_units(block)
    assert asked == [planned.units]
    assert images_of(read) == [b"there"] * 2


class EndsItsProcess:
    """A store whose bytes end the process that reads them, as a parser's crash does."""

    uri = "crash"

    def __init__(self, store: Store, file: str) -> None:
        self._store = store
        self._file = file

    def is_here(self) -> bool:
        return True

    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        if key == self._file:
            os._exit(11)
        return self._store.get_range(key, start, stop, etag=etag)


@pytest.mark.slow
def test_a_unit_that_ends_its_reader_becomes_error_rows(
    corpus: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would repeat the task for ever."""
    for name in "ab":
        rows = [image(name.encode())] * 3
        put_parquet(corpus, f"{name}.parquet", pa.table({"image": rows}), group_rows=3)
    planned = plan(corpus.uri, str(tmp_path / "out"), unit_rows=3)
    store: Any = EndsItsProcess(corpus, "a.parquet")
    monkeypatch.setattr("cluster.corpus.source.task_attempt", lambda: 2)
    first, second = (
        table
        for unit in planned.units
        for block in _read_blocks(store, [unit], planned.manifest.mapping)
        for table in unpack_units(block)
    )
    assert first["_in_error_code"].to_pylist() == ["read_failed"] * 3
    assert "ends the process" in first["_in_error_message"][0].as_py()
    assert images_of(second) == [b"b"] * 3
    (last_word,) = _last_word(store, planned.units[:1], planned.manifest.mapping)
    assert last_word == first, "the node that is asked for a second opinion survives it, too"


def test_units_are_left_out_while_the_store_is_away(corpus: Store, tmp_path: Path) -> None:
    put_parquet(corpus, "a.parquet", pa.table({"image": [image()] * 4}))
    planned = plan(corpus.uri, str(tmp_path / "out"), unit_rows=2)
    mapping = planned.manifest.mapping
    events: list[tuple[str, int]] = []
    away = _Away(corpus)
    for _ in range(2):
        blocks = _read_blocks(away, planned.units, mapping, lambda *event: events.append(event))  # type: ignore[arg-type, misc]
        assert list(blocks) == []
    assert events == [("unit_deferred", 2)] * 2
    assert away.patience == [None, 20.0], "after an outage a reader waits for seconds, not minutes"
    away.is_away = False
    for patience in (20.0, None):
        assert len(list(_read_blocks(away, planned.units, mapping))) == 2  # type: ignore[arg-type]
        assert away.patience[-1] == patience


class _Away:
    def __init__(self, store: Store) -> None:
        self._store = store
        self.uri = store.uri
        self.is_away = True
        self.patience: list[float | None] = []
        self._seconds: float | None = None

    def is_here(self) -> bool:
        return True

    def with_patience(self, seconds: float) -> _Away:
        self._seconds = seconds
        return self

    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        if not self.patience or self._seconds != self.patience[-1] or self.is_away:
            self.patience.append(self._seconds)
        self._seconds = None
        if self.is_away:
            raise StoreError("away")
        return self._store.get_range(key, start, stop, etag=etag)


# The law: as many rows as planned, whatever the bytes.


def _file(rows: int, group_rows: int, compression: str, dictionary: bool, page: int) -> bytes:
    table = pa.table(
        {
            "image": pa.array([image(b"image %d" % (n % 5) * 20) for n in range(rows)], IMAGE),
            "key": [f"key {n}" for n in range(rows)],
            "note": pa.array([None if n % 3 else f"n{n}" for n in range(rows)], pa.string_view()),
            "tags": [[f"t{n}"] * (n % 3) for n in range(rows)],
        }
    )
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=group_rows,
        compression=compression,
        use_dictionary=dictionary,
        data_page_size=page,
    )
    return buffer.getvalue()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_as_many_rows_as_planned_whatever_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Damage comes after planning, with the same etag: bytes flip on the way or on the disk."""
    rows = data.draw(st.integers(1, 40))
    content = bytearray(
        _file(
            rows,
            data.draw(st.integers(1, 30)),
            data.draw(st.sampled_from(["none", "snappy", "zstd"])),
            data.draw(st.booleans()),
            data.draw(st.sampled_from([64, 100_000])),
        )
    )
    folder = tmp_path_factory.mktemp("law")
    store = open_store(str(folder / "in"))
    store.put("a.parquet", bytes(content))
    unit_rows = data.draw(st.integers(1, 20))
    planned = plan(store.uri, str(folder / "out"), unit_rows=unit_rows)
    mapping = planned.manifest.mapping
    whole = read_all(planned)
    size = len(content)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, size - 1))
        length = data.draw(st.sampled_from([1, 1, 8, 64, 512]))
        patch = data.draw(st.sampled_from([b"\0", b"\xff", None]))
        for position in range(start, min(size, start + length)):
            content[position] = (content[position] ^ 0x41) if patch is None else patch[0]
    damaged = _Fixed(store, bytes(content))
    tables = [
        table
        for units in UnitSource(store.uri, mapping, planned.units).tasks
        for table in _read_last(damaged, units, mapping)
    ]
    assert [len(table) for table in tables] == [unit.row_count for unit in planned.units]
    schema = input_schema(mapping.schema)
    for table, unit in zip(tables, planned.units, strict=True):
        assert table.schema == schema
        table.validate(full=True)
        assert set(table["_in_unit"].to_pylist()) == {unit.unit_id}
        assert table["_in_row"].to_pylist() == list(range(unit.row_count))
    assert sum(len(table) for table in tables) == len(whole)


def _read_last(store: Any, units: Sequence[Unit], mapping: Any) -> list[pa.Table]:
    from cluster.corpus.source import _read_tables

    return list(_read_tables(store, units, mapping, last_word=True))


class _Fixed:
    """A store whose one object has these bytes, whatever its etag."""

    def __init__(self, store: Store, content: bytes) -> None:
        self._store = store
        self._content = content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        return self._content[start:stop]


def test_joined_units_keep_their_ids(corpus: Store, tmp_path: Path) -> None:
    put_parquet(corpus, "a.parquet", pa.table({"image": [image()] * 3}))
    parts = plan(corpus.uri, str(tmp_path / "out"), unit_rows=1).units
    assert join_units(parts[:1]) is parts[0]
    assert join_units(parts) == join_units(list(parts))
    assert len({join_units(parts).unit_id, *(part.unit_id for part in parts)}) == 4
    assert Unit.from_dict(join_units(parts).to_dict()) == join_units(parts)
