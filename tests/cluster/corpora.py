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
from cluster.corpus.tar_header import BLOCK, pad
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


def tar_entry(
    name: str,
    data: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    records: dict[str, str] | None = None,
    patch: dict[int, bytes] | None = None,
    between: bytes = b"",
) -> bytes:
    """One entry of a tar. records: of a PAX header before it. patch: bytes of its own header by
    position. between: blocks behind its header that its size does not count."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.pax_headers = kind, len(data), records or {}
    headers = bytearray(info.tobuf(tarfile.PAX_FORMAT if records else tarfile.GNU_FORMAT))
    block = headers[-BLOCK:]
    for position, value in (patch or {}).items():
        block[position : position + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(headers[:-BLOCK] + block) + between + data.ljust(pad(len(data)), b"\0")


TAR_NOTES = (
    tar_entry("label.of.the.archive", kind=b"V"),
    tar_entry("d/", kind=tarfile.DIRTYPE),
    tar_entry("d.jpg/", b"Ya.jpg\0Yb.jpg\0\0", kind=b"D"),
    tar_entry("a.jpg", b"user::rw-", kind=b"A"),
    tar_entry("pax_global_header", b"20 comment=012345678\n", kind=b"g"),
    tar_entry("latest", kind=tarfile.SYMTYPE),
    tar_entry("d/queue", kind=tarfile.FIFOTYPE),
    tar_entry("/dev/null", kind=tarfile.CHRTYPE),
    tar_entry("README", b"read me"),
)
"""Entries of a tar that are in no sample."""


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
