"""Small corpora of a given shape, and a run planned over them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import RunConfig
from cluster.corpus.source import read_unit
from cluster.corpus.unit import Unit
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.runs.planning import plan_run
from cluster.store import Store, open_store
from sppruner.spec import DENSE

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def config(source: str, output: str, **settings: Any) -> RunConfig:
    """A dense caption run; `settings` override or add fields."""
    fields = {"kind": "caption", "model": "m", "prompt": "describe", "spec": DENSE, **settings}
    return RunConfig(input=source, output=output, **fields)


class Planned(NamedTuple):
    """A planned run and its output."""

    manifest: Manifest
    output: RunOutput

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.manifest.units


def plan(source: str, output: str, **settings: Any) -> Planned:
    """Plans or resumes the run of `config` over the corpus at `source`."""
    run_output = RunOutput.open(output)
    manifest = plan_run(
        config(source, output, **settings), run_output, model_revision="r1", image_backend="pil"
    )
    return Planned(manifest, run_output)


def read_all(planned: Planned) -> pa.Table:
    """The rows of all units, in the order of the manifest."""
    store, mapping = open_store(planned.manifest.source), planned.manifest.mapping
    return pa.concat_tables(read_unit(store, unit, mapping) for unit in planned.units)


def image(content: bytes | None = b"jpeg", path: str = "a.jpg") -> dict[str, Any]:
    """One value of an image column, as Hugging Face datasets store it."""
    return {"bytes": content, "path": path}


def put_parquet(
    store: Store, key: str, table: pa.Table, *, group_rows: int = 1_000, **options: Any
) -> None:
    """options: of `pq.write_table`."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group_rows, **options)
    store.put(key, buffer.getvalue())


def tar_bytes(members: Iterable[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class CountingStore:
    """A store that counts the bytes it returns, and knows the most of one call."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.fetched = self.largest = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        data = self._store.get_range(key, start, stop, etag=etag)
        self.fetched += len(data)
        self.largest = max(self.largest, len(data))
        return data
