"""The Parquet reader: roles of columns, boundaries of units, and damaged or replaced files."""

from __future__ import annotations

import io
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.corpus.source import read_unit
from cluster.corpus.unit import Unit
from cluster.errors import StoreError, UsageError
from cluster.output.run_output import RunOutput
from cluster.schema import input_schema, output_schema
from cluster.store import Store, open_store
from tests.cluster.corpora import IMAGE, CountingStore, image, plan, put_parquet, read_all


@pytest.fixture
def corpus(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "in"))


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def table(rows: int, **columns: Any) -> pa.Table:
    images = pa.array([image(f"i{n}".encode(), f"{n}.jpg") for n in range(rows)], IMAGE)
    return pa.table({"image": images, **columns})


def test_rows_are_read_in_order_with_key_image_and_prompt(corpus: Store, output: str) -> None:
    put_parquet(corpus, "a.parquet", table(3, key=["k0", "k1", "k2"], note=["x", None, "z"]))
    planned = plan(corpus.uri, output)
    read = read_all(planned)
    assert read.schema == input_schema(planned.manifest.mapping.schema)
    assert read["_in_key"].to_pylist() == ["k0", "k1", "k2"]
    assert read["_in_image"].to_pylist() == [b"i0", b"i1", b"i2"]
    assert read["_in_prompt"].to_pylist() == ["describe"] * 3
    assert read["_in_error_code"].to_pylist() == [None] * 3
    assert read["note"].to_pylist() == ["x", None, "z"]


def test_image_bytes_are_not_committed_but_paths_are(corpus: Store, output: str) -> None:
    put_parquet(corpus, "a.parquet", table(2))
    read = read_all(plan(corpus.uri, output))
    assert read["image"].to_pylist() == [image(None, "0.jpg"), image(None, "1.jpg")]


def test_a_binary_image_column_is_not_committed(corpus: Store, output: str) -> None:
    put_parquet(corpus, "a.parquet", pa.table({"jpg": [b"one"], "id": [7]}))
    read = read_all(plan(corpus.uri, output))
    assert "jpg" not in read.column_names
    assert read["_in_image"].to_pylist() == [b"one"]
    assert read["_in_key"].to_pylist() == ["7"]
    assert read["id"].to_pylist() == [7]


def test_an_image_column_with_a_known_name_is_preferred(corpus: Store, output: str) -> None:
    columns = {"thumbnail": [b"no"], "Image": [b"yes"]}
    put_parquet(corpus, "a.parquet", pa.table(columns))
    read = read_all(plan(corpus.uri, output))
    assert read["_in_image"].to_pylist() == [b"yes"]
    assert read["thumbnail"].to_pylist() == [b"no"]


def test_missing_keys_fall_back_to_file_and_row(corpus: Store, output: str) -> None:
    put_parquet(corpus, "sub/a.parquet", table(3, key=["k", None, ""]), group_rows=2)
    put_parquet(corpus, "sub/b.parquet", table(1, key=pa.array([None], pa.string())))
    keys = read_all(plan(corpus.uri, output))["_in_key"].to_pylist()
    assert keys == ["k", "sub/a.parquet#1", "sub/a.parquet#2", "sub/b.parquet#0"]


def test_colliding_columns_are_renamed_and_the_key_column_is_not_duplicated(
    corpus: Store, output: str
) -> None:
    columns = {"key": ["k"], "text": ["old"], "source_text": ["older"], "seconds": [1.5]}
    put_parquet(corpus, "a.parquet", table(1, **columns))
    read = read_all(plan(corpus.uri, output))
    assert "source_key" not in read.column_names
    assert read["source_text"].to_pylist() == ["older"]
    assert read["source_source_text"].to_pylist() == ["old"]
    assert read["source_seconds"].to_pylist() == [1.5]


def test_vqa_rows_have_their_own_question_as_prompt(corpus: Store, output: str) -> None:
    columns = {"question": ["why?", None, "  "], "answer": ["so", "x", "y"], "id": [1, 2, 3]}
    put_parquet(corpus, "a.parquet", table(3, **columns))
    read = read_all(plan(corpus.uri, output, kind="vqa"))
    assert read["_in_prompt"].to_pylist() == ["why?", None, "  "]
    assert read["_in_error_code"].to_pylist() == [None, "prompt_invalid", "prompt_invalid"]
    assert read["_in_error_stage"].to_pylist() == [None, "prompt", "prompt"]
    assert read["source_answer"].to_pylist() == ["so", "x", "y"]
    assert "source_question" not in read.column_names


def test_a_null_image_and_null_bytes_are_missing_images(corpus: Store, output: str) -> None:
    images = pa.array([None, image(None), image(b""), image(b"x")], IMAGE)
    put_parquet(corpus, "a.parquet", pa.table({"image": images}))
    read = read_all(plan(corpus.uri, output))
    assert read["_in_error_code"].to_pylist() == ["image_missing", "image_missing", None, None]
    assert read["_in_image"].to_pylist() == [None, None, b"", b"x"]
    assert read["image"].to_pylist()[0] is None


def test_an_error_about_a_missing_image_column_lists_the_columns(
    corpus: Store, output: str
) -> None:
    put_parquet(corpus, "a.parquet", pa.table({"url": ["http://x"], "n": [1]}))
    with pytest.raises(UsageError, match=r"no image column.*url: string, n: int64"):
        plan(corpus.uri, output)


def test_an_error_about_a_missing_question_column_lists_the_columns(
    corpus: Store, output: str
) -> None:
    put_parquet(corpus, "a.parquet", table(1, caption=["c"]))
    with pytest.raises(UsageError, match=r"no question column.*caption: string"):
        plan(corpus.uri, output, kind="vqa")


def test_an_error_about_differing_columns_names_both_files(corpus: Store, output: str) -> None:
    put_parquet(corpus, "a.parquet", table(1, n=[1], same=["s"]))
    put_parquet(corpus, "b.parquet", table(1, n=["one"], same=["s"]))
    with pytest.raises(UsageError) as caught:
        plan(corpus.uri, output)
    for part in ("a.parquet", "b.parquet", "'n' is string instead of int64"):
        assert part in str(caught.value)


def test_an_error_about_a_file_that_is_not_parquet_names_it(corpus: Store, output: str) -> None:
    corpus.put("a.parquet", b"certainly not")
    with pytest.raises(UsageError, match=r"a\.parquet: not a Parquet file"):
        plan(corpus.uri, output)


def spans(planned_units: tuple[Unit, ...]) -> list[tuple[str, int | None, int, int]]:
    return [(u.file, u.row_group, u.row_start, u.row_count) for u in planned_units]


def test_a_unit_never_spans_row_groups(corpus: Store, output: str) -> None:
    put_parquet(corpus, "a.parquet", table(7), group_rows=5)
    units = plan(corpus.uri, output, unit_rows=3).units
    file = "a.parquet"
    assert spans(units) == [(file, 0, 0, 3), (file, 0, 3, 2), (file, 1, 5, 2)]


def test_large_rows_make_units_of_fewer_rows(corpus: Store, output: str) -> None:
    heavy = pa.array([image(os.urandom(10_000)) for _ in range(8)], IMAGE)
    put_parquet(corpus, "a.parquet", pa.table({"image": heavy}))
    units = plan(corpus.uri, output, unit_bytes=35_000).units
    assert [unit.row_count for unit in units] == [3, 3, 2]


def without_group_sizes(data: bytes) -> bytes:
    """The Parquet file with 0 as the size of its one row group, as DuckDB once wrote it."""
    group = pq.read_metadata(io.BytesIO(data)).row_group(0)

    def number(value: int, length: int = 0) -> bytes:
        """In Thrift's compact form, in which a number may be longer than it needs to be."""
        value, digits = 2 * value, bytearray()
        while value or not digits:
            digits.append(value & 127)
            value >>= 7
        digits += bytes(max(0, length - len(digits)))
        return bytes([*(digit | 128 for digit in digits[:-1]), digits[-1]])

    size, rows = number(group.total_byte_size), b"\x16" + number(group.num_rows)
    assert data.count(b"\x16" + size + rows) == 1
    return data.replace(b"\x16" + size + rows, b"\x16" + number(0, len(size)) + rows)


def test_units_of_writers_that_leave_out_the_size_of_row_groups_are_bounded_as_well(
    corpus: Store, output: str
) -> None:
    """Else 256 images of 5 MB each are one unit."""
    heavy = pa.array([image(os.urandom(10_000)) for _ in range(8)], IMAGE)
    put_parquet(corpus, "a.parquet", pa.table({"image": heavy}))
    good = plan(corpus.uri, f"{output}/good", unit_bytes=35_000).units
    corpus.put("a.parquet", without_group_sizes(corpus.get("a.parquet")))
    metadata = pq.read_metadata(io.BytesIO(corpus.get("a.parquet")))
    assert metadata.row_group(0).total_byte_size == 0
    units = plan(corpus.uri, f"{output}/other", unit_bytes=35_000).units
    assert [unit.row_count for unit in units] == [3, 3, 2]
    sizes = [unit.size_bytes for unit in units]
    assert sizes == pytest.approx([unit.size_bytes for unit in good], rel=0.01)


def test_units_are_as_large_as_the_row_groups_own_size_says(corpus: Store, output: str) -> None:
    """It is part of their ids, which committed units of earlier versions keep."""
    put_parquet(corpus, "a.parquet", table(4, note=["x" * 9_000] * 4), group_rows=4)
    group = pq.read_metadata(io.BytesIO(corpus.get("a.parquet"))).row_group(0)
    (unit,) = plan(corpus.uri, output).units
    assert unit.size_bytes == group.total_byte_size
    chunks = map(group.column, range(group.num_columns))
    assert unit.size_bytes != sum(chunk.total_compressed_size for chunk in chunks)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), group_rows=st.integers(1, 15), unit_rows=st.integers(1, 12))
def test_every_row_is_in_exactly_one_unit(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group_rows: int, unit_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    store = open_store(str(folder / "in"))
    put_parquet(store, "a.parquet", table(rows), group_rows=group_rows)
    planned = plan(store.uri, str(folder / "out"), unit_rows=unit_rows)
    read = read_all(planned)
    assert read["_in_image"].to_pylist() == [f"i{n}".encode() for n in range(rows)]
    assert planned.manifest.rows == rows
    assert all(unit.row_count <= unit_rows for unit in planned.units)


def test_reading_a_unit_fetches_only_its_row_group(corpus: Store, output: str) -> None:
    """Reading the whole file for each unit would download a large corpus many times."""
    noise = [image(os.urandom(200_000)) for _ in range(8)]
    put_parquet(corpus, "a.parquet", pa.table({"image": pa.array(noise, IMAGE)}), group_rows=2)
    planned = plan(corpus.uri, output, unit_rows=2)
    counting = CountingStore(corpus)
    size = planned.units[0].file_size
    read_unit(counting, planned.units[1], planned.manifest.mapping)  # type: ignore[arg-type]
    assert counting.fetched < size / 2


def test_a_replaced_object_gives_error_rows_for_its_planned_rows(
    corpus: Store, output: str
) -> None:
    put_parquet(corpus, "a.parquet", table(3, key=["a", "b", "c"]))
    planned = plan(corpus.uri, output)
    put_parquet(corpus, "a.parquet", table(5))
    read = read_all(planned)
    assert read.schema == input_schema(planned.manifest.mapping.schema)
    assert read["_in_error_code"].to_pylist() == ["read_failed"] * 3
    assert read["_in_key"].to_pylist() == [f"a.parquet#{n}" for n in range(3)]
    assert "changed since" in read["_in_error_message"][0].as_py()


def test_a_corrupt_row_group_fails_only_its_own_units(corpus: Store, output: str) -> None:
    put_parquet(corpus, "a.parquet", table(4, text=["a" * 99, "b", "c", "d"]), group_rows=2)
    data = bytearray(corpus.get("a.parquet"))
    data[4:60] = b"\xff" * 56
    corpus.put("a.parquet", bytes(data))
    codes = read_all(plan(corpus.uri, output))["_in_error_code"].to_pylist()
    assert codes == ["read_failed", "read_failed", None, None]


def test_a_store_error_raises_and_makes_no_error_rows(corpus: Store, output: str) -> None:
    """An outage must stop the run, because committed error rows are never replaced."""

    class UnavailableStore(CountingStore):
        def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
            raise StoreError("no answer")

    put_parquet(corpus, "a.parquet", table(1))
    planned = plan(corpus.uri, output)
    with pytest.raises(StoreError, match="no answer"):
        read_unit(UnavailableStore(corpus), planned.units[0], planned.manifest.mapping)  # type: ignore[arg-type]


def test_unit_ids_depend_on_content_not_on_position_in_the_corpus(
    corpus: Store, tmp_path: Path
) -> None:
    put_parquet(corpus, "b.parquet", table(5))
    before = {unit.unit_id for unit in plan(corpus.uri, str(tmp_path / "one"), unit_rows=5).units}
    put_parquet(corpus, "a.parquet", table(4))
    after = {unit.unit_id for unit in plan(corpus.uri, str(tmp_path / "two"), unit_rows=5).units}
    assert before < after


@pytest.mark.parametrize("column", ["key", "question", "answer", "note"])
def test_text_that_is_not_utf8_costs_its_own_row_alone(
    corpus: Store, output: str, column: str
) -> None:
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"R\xc9U", b"c"]).buffers())
    columns: dict[str, Any] = {"question": ["q"] * 3} | {column: bad}
    put_parquet(corpus, "a.parquet", table(3, **columns))
    read = read_all(plan(corpus.uri, output, kind="vqa", prompt="{question}"))
    read.validate(full=True)
    assert read["_in_error_code"].to_pylist() == [None, "read_failed", None]
    assert column in read["_in_error_message"].to_pylist()[1]
    assert read["_in_image"].to_pylist() == [b"i0", None, b"i2"]


def test_a_file_with_a_broken_footer_is_a_usage_error_that_names_it(
    corpus: Store, output: str
) -> None:
    put_parquet(corpus, "a.parquet", table(3))
    data = bytearray(corpus.get("a.parquet"))
    length = int.from_bytes(data[-8:-4], "little")
    data[-8 - length : -8 - length + 20] = b"\xff" * 20
    corpus.put("a.parquet", bytes(data))
    with pytest.raises(UsageError, match=r"a\.parquet: not a Parquet file"):
        plan(corpus.uri, output)


def test_committed_names_differ_in_more_than_case(corpus: Store, output: str) -> None:
    columns = {name: ["x"] for name in ("TEXT", "url", "URL", "Key_2", "source_url")}
    put_parquet(corpus, "a.parquet", table(1, **columns))
    mapping = plan(corpus.uri, output).manifest.mapping
    names = dict(mapping.columns)
    assert names["TEXT"] == "source_TEXT"
    assert (names["url"], names["URL"]) == ("url", "source_source_URL")
    written = [field.name.lower() for field in output_schema(mapping.schema, "caption")]
    assert len(set(written)) == len(written)


@pytest.mark.parametrize(("kind", "key"), [("caption", "7"), ("vqa", "70")])
def test_questions_about_one_image_have_keys_of_their_own(
    corpus: Store, output: str, kind: str, key: str
) -> None:
    put_parquet(corpus, "a.parquet", table(1, image_id=[7], question_id=[70], question=["q"]))
    assert read_all(plan(corpus.uri, output, kind=kind))["_in_key"].to_pylist() == [key]


def test_folders_of_partitions_are_read_and_hidden_ones_are_not(corpus: Store, output: str) -> None:
    for folder in ("lang=en", "_split=train", "_temporary", ".cache"):
        put_parquet(corpus, f"{folder}/a.parquet", table(1))
    listed = {unit.file for unit in plan(corpus.uri, output, unit_rows=1).units}
    assert listed == {"lang=en/a.parquet", "_split=train/a.parquet"}


def test_a_column_that_is_there_twice_is_named_with_its_file(corpus: Store, output: str) -> None:
    twice = pa.Table.from_arrays(
        [pa.array([image()], IMAGE), pa.array(["x"]), pa.array(["y"])], ["image", "note", "note"]
    )
    put_parquet(corpus, "a.parquet", twice)
    with pytest.raises(UsageError, match=r"a\.parquet: several columns are called note; rename"):
        plan(corpus.uri, output)


def test_a_column_name_that_is_not_utf8_is_a_usage_error_that_names_the_file(
    corpus: Store, output: str
) -> None:
    put_parquet(corpus, "a.parquet", table(2, remark=["x", "y"]))
    corpus.put("a.parquet", corpus.get("a.parquet").replace(b"remark", b"rem\xe1rk"))
    with pytest.raises(UsageError, match=r"a\.parquet: not a Parquet file"):
        plan(corpus.uri, output)


def test_a_row_group_of_absurdly_many_rows_is_refused(
    corpus: Store, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.corpus.parquet._MOST_GROUP_ROWS", 10)
    put_parquet(corpus, "a.parquet", table(11))
    with pytest.raises(UsageError, match=r"a\.parquet: row group 0 says it has 11 rows"):
        plan(corpus.uri, output)


def test_the_timestamps_of_spark_keep_their_year(corpus: Store, output: str) -> None:
    """INT96 holds any year; nanoseconds of 64 bits only 1677 to 2262, and wrap around silently."""
    moments = [datetime(9999, 12, 31, 23, 59, 59, 123456), datetime(1500, 1, 1), None]
    rows = table(3, seen=pa.array(moments, pa.timestamp("us")))
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, use_deprecated_int96_timestamps=True)
    corpus.put("a.parquet", buffer.getvalue())
    assert read_all(plan(corpus.uri, output))["seen"].to_pylist() == moments


def test_a_file_name_that_is_not_utf8_is_a_name_like_any_other(
    corpus: Store, output: str, tmp_path: Path
) -> None:
    put_parquet(corpus, "a.parquet", table(2))
    folder = os.fsencode(tmp_path / "in") + b"/part=\xe8"
    os.mkdir(folder)
    os.rename(tmp_path / "in" / "a.parquet", folder + b"/caf\xe9.parquet")
    planned = plan(corpus.uri, output)
    again = RunOutput.open(output).require_manifest()
    assert again == planned.manifest
    read = read_all(planned)
    assert read["_in_image"].to_pylist() == [b"i0", b"i1"]
    assert read["_in_key"].to_pylist() == [
        f"part=\\udce8/caf\\udce9.parquet#{row}" for row in (0, 1)
    ]
    assert read["part"].to_pylist() == ["\\udce8"] * 2
