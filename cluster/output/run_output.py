"""The output prefix of a run; the only place that knows its layout.

    <unit id>.parquet        one committed unit: rows, and its ledger in the footer
    _run/manifest.json       what the run is, created once
    _run/break-even.json     whether pruning pays, where the run decides by measurement
    _run/summary.json        the last attempt's summary
    _run/probe               empty: shows that the store keeps the first of two writers

Readers of Parquet data sets skip `_run/`, so `pyarrow.parquet.read_table(prefix)` sees rows alone.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.ledger import UnitLedger
from cluster.errors import StoreError, UsageError
from cluster.output.manifest import Manifest
from cluster.store import FIRST_CONTACT_S, ObjectInfo, RangedFile, Store, open_store

_SUFFIX: Final = ".parquet"
_MANIFEST: Final = "_run/manifest.json"
_BREAK_EVEN: Final = "_run/break-even.json"
_SUMMARY: Final = "_run/summary.json"
_PROBE: Final = "_run/probe"
_LEDGER: Final = b"sppruner.ledger"
_THREADS: Final = 16

_T = TypeVar("_T")


class RunOutput:
    """The output of one run, on any store. Picklable; threads may share it.

    Every method raises StoreError once the store's retries are spent.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def open(cls, uri: str | os.PathLike[str]) -> RunOutput:
        """The output at `s3://bucket/prefix` or a path. Nothing is contacted yet. Raises
        UsageError on another scheme."""
        return cls(open_store(uri))

    @property
    def uri(self) -> str:
        """The prefix, without a slash at its end."""
        return self._store.uri

    # The manifest

    def manifest(self) -> Manifest | None:
        """What the run is; None for a prefix that holds no run. Raises StoreError if unreadable."""
        store = self._store.with_patience(FIRST_CONTACT_S)  # every command asks this first
        if store.head(_MANIFEST) is None:
            return None
        try:
            return Manifest.from_json(store.get(_MANIFEST))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self._store.uri_of(_MANIFEST)}: not a manifest this version can read "
                f"({error!r}); restore it, or choose another --output"
            ) from error

    def require_manifest(self) -> Manifest:
        """What the run is. Raises UsageError for a prefix that holds no run."""
        manifest = self.manifest()
        if manifest is None:
            raise UsageError(f"{self.uri} holds no run (no {_MANIFEST}): give a job's --output")
        return manifest

    def create_manifest(self, manifest: Manifest) -> bool:
        """Writes the manifest unless there is one; False where another driver was first."""
        return self._store.put_if_absent(_MANIFEST, manifest.to_json(), writer=uuid.uuid4().hex)

    def check_first_writer_wins(self) -> None:
        """Raises UsageError for a store on which two drivers would overwrite each other's units."""
        if not self._store.honours_put_if_absent(_PROBE):
            raise UsageError(
                f"{self.uri}: this server ignores If-None-Match, so that two writers of one object "
                "both succeed; --output needs a store with conditional writes, such as AWS S3, "
                "MinIO, or a directory (AWS_ENDPOINT_URL says which server is asked)"
            )

    def first_parquet_object(self) -> str | None:
        """The address of a Parquet object in this prefix, whoever wrote it; None where there is
        none."""
        listed = self._store.list(suffixes=(_SUFFIX,))
        return self._store.uri_of(listed[0].key) if listed else None

    # Units

    def committed_units(self) -> set[str]:
        """Ids of the committed units."""
        return set(self._listed())

    def commit_unit(
        self, unit_id: str, table: pa.Table, ledger: UnitLedger, *, writer: str
    ) -> bool:
        """Writes a unit, rows and ledger in one object, unless it is committed already; True if
        the committed object is now this one. writer: unique to this call."""
        buffer = pa.BufferOutputStream()
        with pq.ParquetWriter(buffer, table.schema, compression="zstd") as parquet:
            parquet.write_table(table, row_group_size=max(1, table.num_rows))
            parquet.add_key_value_metadata({_LEDGER.decode(): ledger.to_json()})
        data = buffer.getvalue().to_pybytes()
        return self._store.put_if_absent(_unit_key(unit_id), data, writer=writer)

    def read_unit(self, unit_id: str, columns: Collection[str] | None = None) -> pa.Table:
        """A committed unit's rows. columns: to read; None for all. Raises StoreError where it is
        not committed or not readable, UsageError for a column that it does not have."""
        return self.read_units([unit_id], columns)[0]

    def read_units(
        self, unit_ids: Iterable[str], columns: Collection[str] | None = None
    ) -> list[pa.Table]:
        """The rows of committed units, in the order given. See `read_unit`."""

        def read(info: ObjectInfo) -> pa.Table:
            with pq.ParquetFile(RangedFile(self._store, info)) as file:
                names = file.schema_arrow.names
                missing = sorted(set(columns or ()).difference(names))
                if missing:
                    raise UsageError(
                        f"{self._store.uri_of(info.key)} has no column {missing}, only {names}"
                    )
                return file.read(None if columns is None else list(columns))

        return self._each(unit_ids, read)

    def unit_columns(self, unit_id: str) -> list[str]:
        """Names of the columns of a committed unit, from its footer."""

        def read(info: ObjectInfo) -> list[str]:
            return list(pq.read_schema(RangedFile(self._store, info)).names)

        return self._each([unit_id], read)[0]

    def ledgers(self, unit_ids: Iterable[str]) -> list[UnitLedger]:
        """The ledgers of committed units, in the order given, from their footers alone. Raises
        StoreError where a unit is not committed or carries no ledger."""
        return self._each(unit_ids, self._ledger)

    def _ledger(self, info: ObjectInfo) -> UnitLedger:
        metadata = pq.read_metadata(RangedFile(self._store, info)).metadata or {}
        if _LEDGER not in metadata:
            uri = self._store.uri_of(info.key)
            raise StoreError(f"{uri}: no ledger in its footer; it is not a unit of a run")
        try:
            return UnitLedger.from_json(metadata[_LEDGER])
        except (ValueError, TypeError) as error:
            uri = self._store.uri_of(info.key)
            raise StoreError(f"{uri}: not a ledger this version can read ({error})") from error

    # Decisions and summaries

    def break_even(self) -> BreakEven | None:
        """Whether pruning pays; None where the run does not decide that, or has not yet."""
        if self._store.head(_BREAK_EVEN) is None:
            return None
        try:
            return BreakEven.from_dict(json.loads(self._store.get(_BREAK_EVEN)))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self._store.uri_of(_BREAK_EVEN)}: not a decision this version can read "
                f"({error!r}); remove it, and the run decides again"
            ) from error

    def keep_break_even(self, decision: BreakEven) -> BreakEven:
        """The decision that holds from now on: this one, or another driver's that was first."""
        data = json.dumps(decision.to_dict()).encode()
        if self._store.put_if_absent(_BREAK_EVEN, data, writer=uuid.uuid4().hex):
            return decision
        kept = self.break_even()
        assert kept is not None
        return kept

    def has_summary(self) -> bool:
        """Whether an attempt has ended with a summary."""
        return self._store.head(_SUMMARY) is not None

    def put_summary(self, text: str) -> None:
        """Writes or replaces the summary."""
        self._store.put(_SUMMARY, text.encode())

    # Access

    def _listed(self) -> Mapping[str, ObjectInfo]:
        """The committed units' objects by unit id. Objects in folders are none of ours."""
        listed = self._store.list(suffixes=(_SUFFIX,))
        return {i.key.removesuffix(_SUFFIX): i for i in listed if "/" not in i.key}

    def _each(self, unit_ids: Iterable[str], read: Callable[[ObjectInfo], _T]) -> list[_T]:
        """`read` of each unit's object, several at a time, in the order given."""
        wanted = list(unit_ids)
        # One listing gives the sizes of a thousand objects; a few are quicker asked one by one.
        listed = self._listed() if len(wanted) > _THREADS else None

        def read_one(unit_id: str) -> _T:
            key = _unit_key(unit_id)
            info = self._store.head(key) if listed is None else listed.get(unit_id)
            if info is None:
                raise StoreError(f"{self._store.uri_of(key)}: this unit is not committed")
            try:
                return read(info)
            except (pa.ArrowException, OSError) as error:  # OSError: a page that is damaged
                raise StoreError(
                    f"{self._store.uri_of(key)}: not a Parquet file ({error}); remove it and resume"
                ) from error

        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(read_one, wanted))


def _unit_key(unit_id: str) -> str:
    return f"{unit_id}{_SUFFIX}"
