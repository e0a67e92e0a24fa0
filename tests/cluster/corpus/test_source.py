"""Reading through Ray Data: units stay whole, and read concurrency is bounded by the replicas."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
import ray
from ray.exceptions import WorkerCrashedError

from cluster.corpus import source
from cluster.corpus.columns import ColumnMapping
from cluster.corpus.packed import pack_unit, unpack_units
from cluster.corpus.source import read_unit, read_units
from cluster.corpus.unit import Unit
from cluster.errors import StoreError
from cluster.events import OnEvent, RunEvent, ignore_event
from cluster.store import Store, open_store
from jobs.make_corpus import make_corpus
from tests.cluster.corpora import image, plan, put_parquet, read_all
from tests.cluster.labelled_tables import SPEC

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize("rows", [60, 30])
def test_ray_data_neither_divides_nor_joins_units(s3: str, rows: int) -> None:
    """Neither to bound the size of blocks nor, with more CPUs than units, to have more of them;
    also where one task reads several."""
    make_corpus(kind="caption", rows=rows, output=f"{s3}/in")
    planned = plan(f"{s3}/in", f"{s3}/out", spec=SPEC, unit_rows=30)
    # With another number of CPUs Ray does not fuse the stages, which would hide a divided block.
    manifest = planned.manifest
    units = read_units(manifest.source, manifest.mapping, manifest.units)
    labelling = units.map_batches(
        lambda block: block, batch_size=None, batch_format="pyarrow", num_cpus=0.25
    )
    blocks = [ray.get(block) for block in labelling.to_arrow_refs()]
    assert [[len(table) for table in unpack_units(block)] for block in blocks] == [
        [30] for _ in range(rows // 30)
    ]


def read_slowly(
    folder: str,
    company: int,
    store: Store,
    units: Sequence[Unit],
    mapping: ColumnMapping,
    on_event: OnEvent,
) -> Iterator[pa.Table]:
    """Reads a unit in 0.3 s, the first ones only once `company` of them are being read, however
    slowly their processes start; records the time from start to end in a file."""
    (unit,) = units
    started = time.time()
    Path(folder, f"{unit.unit_id}.started").touch()
    deadline = started + 60
    while len(list(Path(folder).glob("*.started"))) < company and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    yield pack_unit(read_unit(store, unit, mapping))
    Path(folder, f"{unit.unit_id}.span").write_text(f"{started} {time.time()}")


@pytest.mark.parametrize(("replicas", "bound"), [(1, 2), (3, 6)])
def test_at_most_two_units_are_read_concurrently_for_each_replica(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replicas: int, bound: int
) -> None:
    """Without the bound, the four CPUs of the session's Ray would run eight readers."""
    monkeypatch.setattr(source, "_read_blocks", partial(read_slowly, str(tmp_path), bound // 3 + 1))
    make_corpus(kind="caption", rows=160, output=f"{s3}/in", format="webdataset")
    planned = plan(f"{s3}/in", f"{s3}/out", spec=SPEC, unit_rows=10)
    manifest = planned.manifest
    units = read_units(manifest.source, manifest.mapping, manifest.units, replicas=replicas)
    units.materialize()
    spans = [tuple(map(float, note.read_text().split())) for note in tmp_path.glob("*.span")]
    assert len(spans) >= len(planned.units)
    concurrent = [sum(start <= at < end for start, end in spans) for at, _ in spans]
    assert bound // 3 < max(concurrent) <= bound


def test_whatever_a_parser_raises_ends_a_unit_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_store(str(tmp_path / "in"))
    put_parquet(corpus, "a.parquet", pa.table({"image": [image()] * 3}))
    planned = plan(corpus.uri, str(tmp_path / "out"))

    def fail(error: Exception) -> pa.Table:
        def read(*_: object) -> pa.Table:
            raise error

        monkeypatch.setattr(source, "read_parquet_units", read)
        return read_all(planned)

    read = fail(RecursionError("too deep"))
    assert read["_in_error_code"].to_pylist() == ["read_failed"] * 3
    with pytest.raises(StoreError):
        fail(StoreError("away"))


@dataclass
class Elsewhere:
    """The store, absent in the process that made this object."""

    uri: str
    at: int

    def is_here(self) -> bool:
        return os.getpid() != self.at

    def __getattr__(self, name: str) -> Any:
        return getattr(open_store(self.uri), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Elsewhere, (self.uri, self.at)


@pytest.mark.parametrize("others", [0, 1, 3])
def test_units_of_a_mount_that_this_node_lacks_are_read_where_it_is_without_waiting(
    s3: str, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_corpus(kind="caption", rows=70, output=f"{s3}/in")
    manifest = plan(f"{s3}/in", f"{s3}/out", spec=SPEC, unit_rows=30).manifest
    events: list[tuple[RunEvent, int]] = []

    def told(kind: RunEvent, count: int) -> None:
        events.append((kind, count))

    monkeypatch.setattr(source, "other_nodes", lambda: ["DEFAULT"] * others)
    store = cast(Store, Elsewhere(manifest.source, os.getpid()))
    blocks = list(source._read_blocks(store, manifest.units, manifest.mapping, told))
    # Without another node it waits for its own mount, and this store answers at once.
    assert [len(table) for block in blocks for table in unpack_units(block)] == [30, 30, 10]
    assert events == ([(RunEvent.UNIT_MOVED, 3)] if others else [])


def sees_nothing(*_: object) -> Iterator[bool]:
    yield False


def test_nodes_without_the_mount_either_are_passed_over(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_corpus(kind="caption", rows=30, output=f"{s3}/in")
    manifest = plan(f"{s3}/in", f"{s3}/out", spec=SPEC, unit_rows=30).manifest
    monkeypatch.setattr(source, "other_nodes", lambda: ["DEFAULT"] * 3)
    monkeypatch.setattr(source, "_read_if_here", sees_nothing)
    store = cast(Store, Elsewhere(manifest.source, os.getpid()))
    events: list[RunEvent] = []
    told = lambda kind, _: events.append(kind)  # noqa: E731
    (block,) = source._read_blocks(store, manifest.units, manifest.mapping, told)
    assert [len(table) for table in unpack_units(block)] == [30]
    assert events == []


def test_a_node_says_first_whether_it_sees_the_store(s3: str) -> None:
    make_corpus(kind="caption", rows=30, output=f"{s3}/in")
    manifest = plan(f"{s3}/in", f"{s3}/out", spec=SPEC, unit_rows=30).manifest
    store = open_store(manifest.source)
    asked = manifest.units, manifest.mapping, ignore_event
    sees, block = source._read_if_here(store, *asked)
    assert sees is True
    assert isinstance(block, pa.Table)
    blind = cast(Store, Elsewhere(manifest.source, os.getpid()))
    assert list(source._read_if_here(blind, *asked)) == [False]


def test_what_a_node_did_not_give_before_it_died_is_left_for_later() -> None:
    events: list[tuple[RunEvent, int]] = []

    def given() -> Iterator[Any]:
        yield ray.put("the first")
        raise WorkerCrashedError

    units = cast(Sequence[Unit], [object()] * 3)
    told = lambda kind, count: events.append((kind, count))  # noqa: E731
    assert list(source._forward(given(), units, told)) == ["the first"]
    assert events == [(RunEvent.UNIT_DEFERRED, 2)]
