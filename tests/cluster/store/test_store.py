"""The contract of stores, on disk and on two servers; for S3 also named causes."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, IncompleteReadError, ReadTimeoutError

from cluster.errors import ObjectGone, StoreError, UsageError
from cluster.store import (
    LocalStore,
    ObjectInfo,
    Patience,
    RangedFile,
    S3Store,
    Store,
    open_store,
)
from tests.cluster.store.clock import FakeClock


@pytest.fixture(params=["local", "s3", "seaweedfs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "root"))
    return open_store(f"{request.getfixturevalue(request.param)}/{tmp_path.name}/some/prefix")


def test_a_put_object_is_returned_by_get_list_and_head(store: Store) -> None:
    store.put("b/two.txt", b"22")
    store.put("a.bin", b"1")
    store.put("b/two.txt", b"222")
    assert store.get("b/two.txt") == b"222"
    assert [(info.key, info.size) for info in store.list()] == [("a.bin", 1), ("b/two.txt", 3)]
    assert [info.key for info in store.list("b/")] == ["b/two.txt"]
    assert [info.key for info in store.list(suffixes=(".bin",))] == ["a.bin"]
    assert store.head("a.bin") == store.list()[0]
    assert store.head("absent") is None


def test_keys_may_hold_any_characters(store: Store) -> None:
    keys = ["a b/c+d", "a%20b", "\u00fc/\u65e5\u672c", "x=1&y=2"]
    for key in keys:
        store.put(key, key.encode())
    assert [info.key for info in store.list()] == sorted(keys)
    assert [store.get(key).decode() for key in keys] == keys


def test_folders_that_consoles_create_are_no_objects(s3: str) -> None:
    store = open_store(s3)
    for key in ("in/", "in/folder/", "in/x"):
        store.put(key, b"")
    assert [info.key for info in open_store(f"{s3}/in").list()] == ["x"]


def test_an_empty_prefix_lists_nothing(store: Store) -> None:
    assert store.list() == []


def test_a_listing_has_more_than_one_page(s3: str) -> None:
    """A page of S3 has at most 1,000 keys; resume would redo every unit beyond the first page."""
    store = open_store(s3)
    keys = [f"{number:05}" for number in range(1_005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert [info.key for info in store.list()] == keys


def test_the_store_keeps_the_first_of_two_writers(store: Store) -> None:
    assert store.honours_put_if_absent("_run/probe")
    assert store.honours_put_if_absent("_run/probe")
    assert store.honours_put_if_match("_run/probe")


def test_ranges_are_half_open_and_end_with_the_object(store: Store) -> None:
    store.put("x", b"0123456789")
    assert store.get_range("x", 2, 5) == b"234"
    assert store.get_range("x", 8, 100) == b"89"
    assert store.get_range("x", 4, 4) == b""
    assert store.get_range("x", 10, 12, etag=etag_of(store, "x")) == b""
    store.put("empty", b"")
    assert store.get_range("empty", 0, 8) == store.get("empty") == b""


def test_a_range_of_a_replaced_object_is_refused(store: Store) -> None:
    """Byte ranges are planned for one version; in another they would give garbage rows."""
    store.put("x", b"0123456789")
    planned = store.head("x")
    assert planned is not None
    assert store.get_range("x", 0, 2, etag=planned.etag) == b"01"
    store.put("x", b"something else")
    with pytest.raises(ObjectGone, match="changed"):
        store.get_range("x", 0, 2, etag=planned.etag)


def test_a_missing_object_raises_object_gone(store: Store) -> None:
    store.put("another", b"")
    with pytest.raises(ObjectGone, match="absent"):
        store.get("absent")
    with pytest.raises(ObjectGone):
        store.get_range("absent", 0, 1)


def test_put_if_absent_keeps_the_first_object(store: Store) -> None:
    assert store.put_if_absent("unit", b"first", writer="a")
    assert not store.put_if_absent("unit", b"second", writer="b")
    assert store.get("unit") == b"first"


def test_exactly_one_of_eight_concurrent_writers_wins(store: Store) -> None:
    barrier = threading.Barrier(8)

    def attempt(number: int) -> bool:
        barrier.wait()
        return store.put_if_absent("unit", f"{number}".encode(), writer=f"w{number}")

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert sum(won) == 1
    assert store.get("unit") == f"{won.index(True)}".encode()


def etag_of(store: Store, key: str) -> str:
    info = store.head(key)
    assert info is not None
    return info.etag


def test_put_if_match_replaces_only_the_version_that_was_seen(store: Store) -> None:
    store.put("unit", b"first")
    seen = etag_of(store, "unit")
    assert store.put_if_match("unit", b"other", etag=seen, writer="a")
    assert not store.put_if_match("unit", b"third", etag=seen, writer="b")
    assert store.get("unit") == b"other"
    assert [info.key for info in store.list()] == ["unit"]


def test_put_if_match_creates_nothing(store: Store) -> None:
    store.put("other", b"")
    assert not store.put_if_match("unit", b"1", etag=etag_of(store, "other"), writer="a")
    assert not store.put_if_match("no/such/unit", b"1", etag="1-1", writer="a")
    assert [info.key for info in store.list()] == ["other"]


def test_every_replacement_is_another_version(store: Store) -> None:
    """A disk's clock ticks in milliseconds: two objects of one size may get the same time."""
    store.put("unit", b"0")
    seen = {etag_of(store, "unit")}
    for number in range(1, 10):
        newest = etag_of(store, "unit")
        assert store.put_if_match("unit", f"{number}".encode(), etag=newest, writer=f"{number}")
        assert not store.put_if_match("unit", b"x", etag=newest, writer="late")
        seen.add(etag_of(store, "unit"))
    assert len(seen) == 10


def test_exactly_one_of_eight_concurrent_replacements_wins(store: Store) -> None:
    store.put("unit", b"x")
    seen, barrier = etag_of(store, "unit"), threading.Barrier(8)

    def attempt(number: int) -> bool:
        barrier.wait()
        return store.put_if_match("unit", f"{number}".encode(), etag=seen, writer=f"w{number}")

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert sum(won) == 1
    assert store.get("unit") == f"{won.index(True)}".encode()


def test_a_store_is_picklable(store: Store) -> None:
    store.put("x", b"1")
    assert pickle.loads(pickle.dumps(store)).get("x") == b"1"


def test_ranged_file_reads_like_a_file(store: Store) -> None:
    data = os.urandom(5_000)
    store.put("x", data)
    info = store.head("x")
    assert info is not None
    file = RangedFile(store, info, window=512)
    assert file.read(10) == data[:10]
    file.seek(-20, os.SEEK_END)
    assert file.read() == data[-20:]
    file.seek(100)
    buffer = bytearray(700)
    assert file.readinto(buffer) == 700
    assert bytes(buffer) == data[100:800]


def test_local_temporary_files_are_never_listed(tmp_path: Path) -> None:
    (tmp_path / ".abc.tmp").write_bytes(b"half")
    assert open_store(str(tmp_path)).list() == []
    assert isinstance(open_store(f"file://{tmp_path}"), LocalStore)


def test_local_writes_leave_no_temporary_files(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_if_absent("x", b"1", writer="a")
    store.put_if_absent("x", b"2", writer="b")
    store.put("x", b"3")
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_that_cannot_be_read_is_no_smaller_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except for the folder that an ext4 volume keeps for itself, which only root may read."""
    store = LocalStore(tmp_path)
    store.put("a/one", b"")
    store.put("b/two", b"")
    store.put("a/lost+found/three", b"")
    scandir = os.scandir

    def refusing(path: Any) -> Any:  # root may read any folder, so rights alone would not do
        if Path(path).name in ("b", "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(StoreError, match="/b: Permission denied"):
        store.list()
    assert [info.key for info in store.list("a/")] == ["a/one"]


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "s3://", "s3:///prefix"])
def test_unusable_uris_are_usage_errors(uri: str) -> None:
    with pytest.raises(UsageError, match="s3://bucket/prefix"):
        open_store(uri)


@pytest.mark.parametrize("uri", ["", "  ", "s3:/bucket/x", "file:/x", "s3:bucket"])
def test_a_slip_of_the_pen_is_no_folder_of_that_name(uri: str) -> None:
    """An unset variable would mean the current directory, one slash a folder called `s3:`."""
    with pytest.raises(UsageError, match=r"empty|two slashes"):
        open_store(uri)


@pytest.mark.parametrize("host", ["", "localhost", "LOCALHOST"])
@pytest.mark.parametrize("path", ["/", "/a", "/a/b.parquet", "/localhost/a", "//a"])
def test_a_file_uri_is_a_path_of_this_machine(host: str, path: str) -> None:
    """RFC 8089: the host is no part of the path."""
    assert open_store(f"file://{host}{path}").uri == os.path.normpath(path.replace("//", "/"))


@pytest.mark.parametrize("host", ["other", "127.0.0.1", "data", ".", "localhost.example.org"])
def test_files_of_another_host_are_a_usage_error(host: str) -> None:
    with pytest.raises(UsageError, match=rf"{host} is the name of a host.*file:///path"):
        open_store(f"file://{host}/a")


def test_paths_may_be_path_objects(tmp_path: Path) -> None:
    assert open_store(tmp_path).uri == str(tmp_path)


def test_a_missing_bucket_is_named_as_the_cause(s3: str) -> None:
    with pytest.raises(StoreError, match="bucket does not exist"):
        open_store("s3://no-such-bucket/x").list()


def test_an_unreachable_endpoint_is_named(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"no answer from http://127\.0\.0\.1:9"):
        open_store(s3).with_patience(0).list()


def test_missing_credentials_name_the_variables_to_set(
    monkeypatch: pytest.MonkeyPatch, s3: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID"):
        open_store(s3).with_patience(0).list()


class FailingClient:
    """A client whose next calls of `method` raise `failures`; with `act`, after the real call."""

    def __init__(self, client: Any, method: str, failures: list[Exception], *, act: bool) -> None:
        self._client, self._method, self._failures, self._act = client, method, failures, act

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)
        if name != self._method or not self._failures:
            return real

        def call(**arguments: Any) -> Any:
            if not self._failures:
                return real(**arguments)
            if self._act:
                real(**arguments)
            raise self._failures.pop(0)

        return call


def failing_store(uri: str, method: str, *failures: Exception, act: bool = False) -> S3Store:
    """A store on a FailingClient."""

    client = FailingClient(S3Store("any", "")._client(), method, list(failures), act=act)

    class FailingStore(S3Store):
        def _client(self) -> Any:
            return client

    patience = Patience(seconds=60, clock=FakeClock())
    return FailingStore(uri.removeprefix("s3://"), "", patience=patience)


TIMEOUT = ReadTimeoutError(endpoint_url="http://store")
CONFLICT = ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject")
TAKEN = ClientError({"Error": {"Code": "PreconditionFailed"}}, "PutObject")


def test_a_put_whose_response_was_lost_counts_as_ours(s3: str) -> None:
    store = failing_store(s3, "put_object", TIMEOUT, act=True)
    assert store.put_if_absent("unit", b"ours", writer="me")


def test_a_resent_put_that_meets_its_own_object_counts_as_ours(s3: str) -> None:
    """botocore resends a PUT whose connection broke, and the second one meets the first."""
    store = failing_store(s3, "put_object", TAKEN, act=True)
    assert store.put_if_absent("unit", b"ours", writer="me")


def test_a_put_that_never_arrived_is_retried(s3: str) -> None:
    store = failing_store(s3, "put_object", TIMEOUT)
    assert store.put_if_absent("unit", b"ours", writer="me")
    assert store.get("unit") == b"ours"


def test_a_put_whose_response_was_lost_loses_to_an_earlier_writer(s3: str) -> None:
    open_store(s3).put_if_absent("unit", b"theirs", writer="them")
    store = failing_store(s3, "put_object", TIMEOUT)
    assert not store.put_if_absent("unit", b"ours", writer="me")


def test_a_conflicting_put_is_retried(s3: str) -> None:
    store = failing_store(s3, "put_object", CONFLICT, CONFLICT)
    assert store.put_if_absent("unit", b"ours", writer="me")


@pytest.mark.parametrize("failure", [TIMEOUT, TAKEN, CONFLICT], ids=["lost", "resent", "conflict"])
def test_a_replacement_whose_response_was_lost_counts_as_ours(s3: str, failure: Exception) -> None:
    open_store(s3).put("unit", b"old")
    seen = etag_of(open_store(s3), "unit")
    store = failing_store(s3, "put_object", failure, act=True)
    assert store.put_if_match("unit", b"ours", etag=seen, writer="me")


def test_a_server_without_conditional_writes_is_named(s3: str) -> None:
    refused = ClientError({"Error": {"Code": "NotImplemented"}}, "PutObject")
    store = failing_store(s3, "put_object", refused)
    with pytest.raises(StoreError, match="If-Match"):
        store.put_if_match("unit", b"ours", etag="x", writer="me")


def test_a_broken_response_body_is_retried(s3: str) -> None:
    open_store(s3).put("x", b"data")
    broken = IncompleteReadError(actual_bytes=1, expected_bytes=4)
    assert failing_store(s3, "get_object", broken, TIMEOUT).get("x") == b"data"


def test_exhausted_retries_raise_a_store_error(s3: str) -> None:
    open_store(s3).put("x", b"data")
    with pytest.raises(StoreError, match="no answer"):
        failing_store(s3, "get_object", *[TIMEOUT] * 99).get("x")


def test_linked_folders_are_listed_once_however_links_lead_to_them(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "real" / "a.txt").write_text("a")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "real" / "loop").symlink_to(root)
    (root / "real" / "self").symlink_to(root / "real")
    (root / "again").symlink_to(root / "real")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    assert [info.key for info in LocalStore(root).list()] == ["link/b.txt", "real/a.txt"]


def test_folders_that_a_file_system_numbers_alike_are_all_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that unite others, virtiofs and mergerfs, give folders of both one inode."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tar").write_text(name)
    real = os.stat

    def stat(path: Any, **more: Any) -> os.stat_result:
        found = list(real(path, **more))
        found[1], found[2] = 7, 7
        return os.stat_result(found)

    monkeypatch.setattr(os, "stat", stat)
    assert [info.key for info in LocalStore(tmp_path).list()] == ["one/a.tar", "two/a.tar"]


class Listing(S3Store):
    """Pages of names, by the token that asks for them."""

    def __init__(self, pages: dict[str | None, tuple[list[str], str | None]]) -> None:
        super().__init__("bucket", "", patience=Patience(seconds=60, clock=FakeClock()))
        self._pages = pages

    def _list_page(
        self, prefix: str, token: str | None, client: Any
    ) -> tuple[list[ObjectInfo], str | None]:
        names, following = self._pages[token]
        return [ObjectInfo(key=name, size=1, etag=name) for name in names], following


def test_a_key_that_a_server_lists_twice_is_one_object() -> None:
    pages: dict[str | None, tuple[list[str], str | None]] = {
        None: (["b", "a", "b"], "1"),
        "1": (["b", "c"], None),
    }
    assert [info.key for info in Listing(pages).list()] == ["a", "b", "c"]


def test_a_listing_that_goes_round_ends() -> None:
    pages: dict[str | None, tuple[list[str], str | None]] = {
        None: (["a"], "1"),
        "1": (["b"], "2"),
        "2": (["c"], "1"),
    }
    with pytest.raises(StoreError, match="does not go on"):
        Listing(pages).list()
