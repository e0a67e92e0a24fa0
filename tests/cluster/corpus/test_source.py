"""Reading through Ray Data: units stay whole, and read concurrency is bounded by the replicas."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from cluster.corpus import source
from cluster.corpus.columns import ColumnMapping
from cluster.corpus.packed import pack_unit, unpack_units
from cluster.corpus.source import read_unit, read_units
from cluster.corpus.unit import Unit
from cluster.errors import StoreError
from cluster.events import OnEvent, RunEvent
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


@pytest.mark.parametrize("others", [True, False])
def test_units_of_a_mount_that_this_node_lacks_are_read_on_another_without_waiting(
    s3: str, others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_corpus(kind="caption", rows=30, output=f"{s3}/in")
    manifest = plan(f"{s3}/in", f"{s3}/out", spec=SPEC, unit_rows=30).manifest
    asked: list[Sequence[Unit]] = []
    events: list[tuple[RunEvent, int]] = []
    store = open_store(manifest.source)

    def elsewhere(_: Store, units: Sequence[Unit], mapping: ColumnMapping) -> list[pa.Table]:
        asked.append(units)
        return [read_unit(open_store(manifest.source), unit, mapping) for unit in units]

    monkeypatch.setattr(store, "is_here", lambda: False)
    monkeypatch.setattr(source, "another_node", lambda: object() if others else None)
    monkeypatch.setattr(source, "_ask_elsewhere", elsewhere)
    told = lambda kind, count: events.append((kind, count))  # noqa: E731
    blocks = list(source._read_blocks(store, manifest.units, manifest.mapping, told))
    assert [len(table) for block in blocks for table in unpack_units(block)] == [30]
    assert len(asked) == others, "without another node it waits for its own mount"
    assert events == ([(RunEvent.UNIT_MOVED, 1)] if others else [])
