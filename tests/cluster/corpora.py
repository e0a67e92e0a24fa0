"""Small corpora written by hand, for tests that need a particular shape."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import RunConfig
from cluster.corpus.source import read_unit
from cluster.runs.planning import Plan, plan_run
from cluster.store import Store, open_store
from sppruner.spec import DENSE

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def config(source: str, output: str, **settings: Any) -> RunConfig:
    given = {"kind": "caption", "model": "m", "prompt": "describe", "spec": DENSE, **settings}
    return RunConfig(input=source, output=output, **given)


def plan(source: str, output: str, **settings: Any) -> Plan:
    given = config(source, output, **settings)
    return plan_run(given, model_revision="r1", image_backend="pil")


def read_all(planned: Plan) -> pa.Table:
    """Every unit's rows, in plan order."""
    store = open_store(planned.input_uri)
    return pa.concat_tables(read_unit(store, unit, planned.layout) for unit in planned.units)


def image(content: bytes | None = b"jpeg", path: str = "a.jpg") -> dict[str, Any]:
    return {"bytes": content, "path": path}


def put_parquet(store: Store, key: str, table: pa.Table, *, group_rows: int = 1_000) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group_rows)
    store.put(key, buffer.getvalue())


def tar_bytes(members: Iterable[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
