"""The output prefix of a run; the only place that knows its layout.

    <run id>-<unit id>.parquet   one committed unit: rows, and its ledger in the footer
    _run/manifest.json           what the run is, created once
    _run/break-even.json         whether pruning pays, where the run decides by measurement
    _run/dtype.json              the replicas' dtype, where the run does not name one
    _run/summary.json            the last attempt's summary
    _run/index/<name>.json       the index of one tar of a large corpus, for planners
    _run/probe                   empty: shows that the store keeps the first of two writers
    .huggingface.yaml            which objects are rows, for Hugging Face's load_dataset(prefix)

Readers of Parquet data sets skip `_run/` and hidden names, so `pyarrow.parquet.read_table(prefix)`
sees rows alone.
A unit of another run is never counted as one of ours, nor a unit as another one under whose name
it lies.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.ledger import UnitLedger
from cluster.errors import ObjectGone, StoreError, UsageError
from cluster.output.manifest import Manifest
from cluster.output.unit_file import UnitFooter, has_written_rows, read_footer, write_unit_file
from cluster.output.unit_names import SUFFIX, UnitNames
from cluster.store import FIRST_CONTACT_S, ObjectInfo, RangedFile, Store, open_store

_MANIFEST: Final = "_run/manifest.json"
_BREAK_EVEN: Final = "_run/break-even.json"
_INDEX: Final = "_run/index/"
_DTYPE: Final = "_run/dtype.json"
_SUMMARY: Final = "_run/summary.json"
_PROBE: Final = "_run/probe"
_DATA_FILES: Final = ".huggingface.yaml"
_MANIFEST_HEAD: Final = 256  # bytes; a manifest begins with the run's id
_THREADS: Final = 16
# A unit is replaced while it is read at most as often as somebody asks its failed rows again.
_READS: Final = 8

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedUnit:
    """One version of a committed unit."""

    info: ObjectInfo
    """The object, as it was when it was read."""
    table: pa.Table
    """Its rows, in unit order."""
    footer: UnitFooter
    """What it says about itself."""


class RunOutput:
    """The output of one run, on any store. Picklable; threads may share it.

    Every method raises StoreError once the store's retries are spent.
    """

    def __init__(self, store: Store, names: UnitNames | None = None) -> None:
        """names: of the run's units; None: as the manifest says, once that is read."""
        self._store = store
        self._known_names = names

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

    def is_here(self) -> bool:
        """Whether this machine sees the run's output, found out at once: a folder of the same name
        may be an older run's, below a mount that is missing. A store that does not answer may be
        anybody's trouble, and is waited for by whoever writes."""
        if not self._store.is_here():
            return False
        try:
            return self._holds_run(self._store.with_patience(0))
        except StoreError:
            return True

    def check_run(self) -> None:
        """Raises StoreError where the prefix was emptied or holds another run by now."""
        if not self._holds_run(self._store):
            raise StoreError(
                f"{self.uri} is not the output of run {self._names.run_id} any more: its manifest "
                "was removed or replaced while the run went on; end this run's commands, or give "
                "them another --output"
            )

    def manifest_head(self, *, patience_s: float = FIRST_CONTACT_S) -> bytes | None:
        """The first bytes of the manifest that this machine sees: run id and time of its planning.
        None where it sees none, which is not to be confused with a store that does not answer:
        that raises StoreError."""
        store = self._store.with_patience(patience_s)
        # Asked first: a local store waits for a file that is missing where one is expected.
        if not store.is_here() or store.head(_MANIFEST) is None:
            return None
        try:
            return _read_head(store)
        except ObjectGone:
            return None

    def _holds_run(self, store: Store) -> bool:
        """store: the output's, with the patience to ask with."""
        try:
            return json.dumps(self._names.run_id).encode() in _read_head(store)
        except ObjectGone:
            return False

    def manifest(self) -> Manifest | None:
        """What the run is; None for a prefix that holds no run. Raises StoreError if unreadable."""
        store = self._store.with_patience(FIRST_CONTACT_S)  # every command asks this first
        if store.head(_MANIFEST) is None:
            return None
        try:
            manifest = Manifest.from_json(store.get(_MANIFEST))
        except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise StoreError(
                f"{self._store.uri_of(_MANIFEST)}: not a manifest this version can read "
                f"({error!r}); restore it, or choose another --output"
            ) from error
        self._known_names = UnitNames.of(manifest)
        return manifest

    def require_manifest(self) -> Manifest:
        """What the run is. Raises UsageError for a prefix that holds no run."""
        manifest = self.manifest()
        if manifest is None:
            raise UsageError(f"{self.uri} holds no run (no {_MANIFEST}): give a job's --output")
        return manifest

    def check_place(self) -> None:
        """Raises UsageError where no run can ever be, StoreError where none can be written now. One
        that is there may lie on a drive that is read alone: a finished run needs no write."""
        if self.manifest_head() is None:
            self._store.with_patience(FIRST_CONTACT_S).check_place()

    def create_manifest(self, manifest: Manifest) -> bool:
        """Writes the manifest unless there is one; False where another driver was first."""
        created = self._store.put_if_absent(_MANIFEST, manifest.to_json(), writer=uuid.uuid4().hex)
        if created:
            self._known_names = UnitNames.of(manifest)
        return created

    def check_first_writer_wins(self) -> None:
        """Raises UsageError for a store on which two drivers would overwrite each other's units."""
        if not self._store.honours_put_if_absent(_PROBE):
            raise UsageError(
                f"{self.uri}: this server ignores If-None-Match, so that two writers of one object "
                "both succeed; --output needs a store with conditional writes, such as AWS S3, "
                "MinIO, or a directory (AWS_ENDPOINT_URL says which server is asked)"
            )

    def check_replaced_by_version(self) -> None:
        """Raises UsageError for a store on which two commands that ask failed rows again would
        overwrite each other's answers."""
        if not self._store.honours_put_if_match(_PROBE):
            raise UsageError(
                f"{self.uri}: this server ignores If-Match, so that what replaces a unit's failed "
                "rows could undo another writer's; copy the output to a store with conditional "
                "writes, such as AWS S3, MinIO, or a directory, and ask again there"
            )

    def describe_data_files(self) -> None:
        """Says which objects are rows, for readers that would take every file for one: `datasets`
        reads `_run/*.json` otherwise. It knows no other hidden name than this one. What people
        wrote there stays; what an earlier run left, whose rows were removed, does not."""
        wanted = _data_files(self._names.prefix)
        known = self._store.head(_DATA_FILES) is not None
        before = self._store.get(_DATA_FILES) if known else b""
        earlier = re.search(rb"[0-9a-f]{16}-", before)
        if before not in (wanted, _data_files(earlier[0].decode()) if earlier else b""):
            return
        if before != wanted:
            self._store.put(_DATA_FILES, wanted)

    def first_parquet_object(self) -> str | None:
        """The address of a Parquet object in this prefix, whoever wrote it; None where there is
        none."""
        listed = self._store.list(suffixes=(SUFFIX,))
        return self._store.uri_of(listed[0].key) if listed else None

    # Units

    def committed_units(self) -> set[str]:
        """Ids of the committed units; none of a prefix that holds no run. Raises StoreError where
        another run's unit has the name of one of ours."""
        if self._known_names is None and self.manifest() is None:
            return set()
        listed = self._listed()
        if self._names.layout == 1:
            # Names of that layout are the same in every run over the corpus: footers tell whose
            # they are.
            self._each(listed, self._footer)
        return set(listed)

    def foreign_objects(self, planned: Collection[str]) -> list[str]:
        """Addresses of objects that readers of the prefix would read beside the run's units.
        planned: ids of the run's units."""
        return [
            self._store.uri_of(info.key)
            for info in self._store.list()
            if not any(part.startswith(("_", ".")) for part in info.key.split("/"))
            and self._names.unit_id(info.key) not in planned
        ]

    def commit_unit(
        self,
        unit_id: str,
        table: pa.Table,
        ledger: UnitLedger,
        *,
        writer: str,
        plan: str | None = None,
    ) -> bool:
        """Writes a unit, rows and ledger in one object, unless it is committed already; True if
        the committed object is now this one. writer: unique to this call. plan: of its run."""
        footer = UnitFooter(ledger=ledger, run_id=self._names.run_id, unit_id=unit_id, plan=plan)
        data = write_unit_file(table, footer)
        return self._store.put_if_absent(self._names.key(unit_id), data, writer=writer)

    def open_unit(self, unit_id: str) -> CommittedUnit:
        """A committed unit, rows and footer of one version. Raises StoreError where it is not
        committed, not readable, or another one."""

        def read(info: ObjectInfo) -> CommittedUnit:
            footer = self._footer(info)
            with pq.ParquetFile(RangedFile(self._store, info)) as file:
                return CommittedUnit(info=info, table=file.read(), footer=footer)

        return self._each([unit_id], read)[0]

    def has_written_rows(self, unit_id: str) -> bool:
        """Whether a committed unit's rows are, byte by byte, those that its writer wrote. Raises as
        `open_unit` does."""
        return self._each([unit_id], lambda info: has_written_rows(self._store.get(info.key)))[0]

    def replace_unit(
        self, unit: CommittedUnit, table: pa.Table, footer: UnitFooter, *, writer: str
    ) -> bool:
        """Replaces this version of a unit by another one; False where it is another version by
        now. writer: unique to this call."""
        data, info = write_unit_file(table, footer), unit.info
        return self._store.put_if_match(info.key, data, etag=info.etag, writer=writer)

    def read_unit(self, unit_id: str, columns: Collection[str] | None = None) -> pa.Table:
        """A committed unit's rows. columns: to read; None for all. Raises StoreError where it is
        not committed or not readable, UsageError for a column that it does not have."""
        return self.read_units([unit_id], columns)[0]

    def read_units(
        self, unit_ids: Iterable[str], columns: Collection[str] | None = None
    ) -> list[pa.Table]:
        """The rows of committed units, in the order given. See `read_unit`."""
        return self._each(unit_ids, partial(self._read_rows, columns))

    def iterate_units(
        self, unit_ids: Sequence[str], columns: Collection[str], *, at_once: int
    ) -> Iterator[pa.Table]:
        """`read_units`, of which so many are in memory at once. The output is listed once."""
        listed, read = self._listed(), partial(self._read_rows, columns)
        for first in range(0, len(unit_ids), at_once):
            yield from self._each(unit_ids[first : first + at_once], read, listed)

    def _read_rows(self, columns: Collection[str] | None, info: ObjectInfo) -> pa.Table:
        with pq.ParquetFile(RangedFile(self._store, info)) as file:
            names = file.schema_arrow.names
            missing = sorted(set(columns or ()).difference(names))
            if missing:
                raise UsageError(
                    f"{self._store.uri_of(info.key)} has no column {missing}, only {names}"
                )
            return file.read(None if columns is None else list(columns))

    def unit_columns(self, unit_id: str) -> list[str]:
        """Names of the columns of a committed unit, from its footer."""

        def read(info: ObjectInfo) -> list[str]:
            return list(pq.read_schema(RangedFile(self._store, info)).names)

        return self._each([unit_id], read)[0]

    def ledgers(self, unit_ids: Iterable[str]) -> list[UnitLedger]:
        """The ledgers of committed units, in the order given. See `footers`."""
        return [footer.ledger for footer in self.footers(unit_ids)]

    def footers(self, unit_ids: Iterable[str]) -> list[UnitFooter]:
        """The footers of committed units, in the order given, without their rows. Raises
        StoreError where a unit is not committed, carries no ledger, or is another run's or another
        unit under its name."""
        return self._each(unit_ids, self._footer)

    def _footer(self, info: ObjectInfo) -> UnitFooter:
        uri = self._store.uri_of(info.key)
        try:
            footer = read_footer(RangedFile(self._store, info))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, pa.ArrowException):
                raise
            raise StoreError(f"{uri}: not a ledger this version can read ({error})") from error
        if footer is None:
            raise StoreError(f"{uri}: no ledger in its footer; it is not a unit of a run")
        if footer.run_id not in (None, self._names.run_id):
            raise StoreError(
                f"{uri}: a unit of run {footer.run_id} where one of run {self._names.run_id} "
                "belongs: end what still writes for that run, remove the object and resume"
            )
        if footer.unit_id not in (None, self._names.unit_id(info.key)):
            raise StoreError(
                f"{uri}: it holds unit {footer.unit_id} of the run, whose rows would count twice, "
                "and the rows of the unit of this name are missing: remove the object and resume"
            )
        return footer

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

    def dtype(self) -> str | None:
        """The dtype of the replicas with which a run of dtype `auto` was begun; None for others,
        and for one that had no replicas yet."""
        if self._store.head(_DTYPE) is None:
            return None
        try:
            return str(json.loads(self._store.get(_DTYPE))["dtype"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self._store.uri_of(_DTYPE)}: no dtype ({error!r})") from error

    def keep_dtype(self, dtype: str) -> str:
        """The dtype that holds from now on: this one, or that of an earlier attempt."""
        data = json.dumps({"dtype": dtype}).encode()
        if self._store.put_if_absent(_DTYPE, data, writer=uuid.uuid4().hex):
            return dtype
        kept = self.dtype()
        assert kept is not None
        return kept

    def file_index(self, name: str) -> bytes | None:
        """What `keep_file_index` kept under this name; None where that is nothing."""
        key = f"{_INDEX}{name}.json"
        # Asked first: a local store waits for a file that is missing where one is expected.
        return None if self._store.head(key) is None else self._store.get(key)

    def keep_file_index(self, name: str, data: bytes) -> None:
        """Keeps the index of one file for other planners of this run; the first one stays."""
        self._store.put_if_absent(f"{_INDEX}{name}.json", data, writer=uuid.uuid4().hex)

    def summary(self) -> bytes | None:
        """The summary that the last attempt wrote; None where none did."""
        return None if self._store.head(_SUMMARY) is None else self._store.get(_SUMMARY)

    def put_summary(self, text: str) -> None:
        """Writes or replaces the summary."""
        self._store.put(_SUMMARY, text.encode())

    # Access

    @property
    def _names(self) -> UnitNames:
        if self._known_names is None:
            self.require_manifest()
        assert self._known_names is not None
        return self._known_names

    def _listed(self) -> Mapping[str, ObjectInfo]:
        """The objects that are called like units of the run, by unit id."""
        listed = self._store.list(self._names.prefix, suffixes=(SUFFIX,))
        named = ((self._names.unit_id(info.key), info) for info in listed)
        return {unit_id: info for unit_id, info in named if unit_id is not None}

    def _each(
        self,
        unit_ids: Iterable[str],
        read: Callable[[ObjectInfo], _T],
        listed: Mapping[str, ObjectInfo] | None = None,
    ) -> list[_T]:
        """`read` of each unit's object, several at a time, in the order given."""
        wanted = list(unit_ids)
        # One listing gives the sizes of a thousand objects; a few are quicker asked one by one.
        if listed is None and len(wanted) > _THREADS:
            listed = self._listed()

        def read_one(unit_id: str) -> _T:
            key = self._names.key(unit_id)
            info = self._store.head(key) if listed is None else listed.get(unit_id)
            reads_left = _READS
            while info is not None:
                try:
                    return read(info)
                except ObjectGone as error:  # replaced since, by rows that were asked again
                    reads_left -= 1
                    if not reads_left:
                        raise StoreError(
                            f"{self._store.uri_of(key)}: replaced {_READS} times while it was read;"
                            " end all but one of the commands that ask its rows again"
                        ) from error
                    info = self._store.head(key)
                except (pa.ArrowException, OSError) as error:  # OSError: a page that is damaged
                    raise StoreError(
                        f"{self._store.uri_of(key)}: not a Parquet file ({error}); "
                        "remove it and resume"
                    ) from error
            raise StoreError(f"{self._store.uri_of(key)}: this unit is not committed")

        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(read_one, wanted))


def _read_head(store: Store) -> bytes:
    return store.get_range(_MANIFEST, 0, _MANIFEST_HEAD)


def _data_files(prefix: str) -> bytes:
    config = {"config_name": "default", "data_files": f"{prefix}*{SUFFIX}"}
    return yaml.safe_dump({"configs": [config]}).encode()
