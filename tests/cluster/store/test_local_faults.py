"""Files under faults: killed processes, errors of a shared file system, mounts that are away."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cluster.errors import ObjectGone, StoreError
from cluster.store import LocalStore, Patience
from tests.cluster.store.clock import EventfulClock, FakeClock


def patient(root: Path, clock: FakeClock | None = None) -> LocalStore:
    return LocalStore(root, patience=Patience(seconds=600, clock=clock or FakeClock()))


# Processes

# Python 3.12 warns of forks beside threads; these children take no lock of theirs and exit at once.
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def fork(act: Callable[[], bool]) -> int:
    """The id of a child that acts and ends with 0 for True, 1 for False."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            code = 0 if act() else 1
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@FORKS
def test_a_process_that_was_stopped_inside_a_replacement_holds_nobody_for_ever(
    tmp_path: Path,
) -> None:
    store, clock = LocalStore(tmp_path), FakeClock()
    store.put("unit", b"old")
    info = store.head("unit")
    assert info is not None
    holding, told = os.pipe()

    def hold() -> bool:
        with store._lock(tmp_path):
            os.write(told, b".")
            signal.pause()
        return True

    holder = fork(hold)
    os.read(holding, 1)
    waiting = patient(tmp_path, clock)
    with pytest.raises(StoreError, match=r"another process holds .*\.replace\.lock; end it"):
        waiting.put_if_match("unit", b"new", etag=info.etag, writer="w")
    assert clock.time >= 600
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert waiting.put_if_match("unit", b"new", etag=info.etag, writer="w")
    assert not list(tmp_path.glob(".*.tmp"))


def test_whoever_may_write_to_a_folder_may_lock_it(tmp_path: Path) -> None:
    """A team's folder is its group's; the lock is whoever's came first."""
    tmp_path.chmod(0o775)
    umask = os.umask(0o077)
    try:
        with LocalStore(tmp_path)._lock(tmp_path):
            pass
    finally:
        os.umask(umask)
    assert (tmp_path / ".replace.lock").stat().st_mode & 0o777 == 0o664


@FORKS
@pytest.mark.parametrize("method", ["put_if_absent", "put_if_match"])
def test_exactly_one_of_many_racing_processes_wins(tmp_path: Path, method: str) -> None:
    store = LocalStore(tmp_path)
    for number in range(10):
        key = f"unit{number}"
        condition = {}
        if method == "put_if_match":
            store.put(key, b"old")
            info = store.head(key)
            assert info is not None
            condition = {"etag": info.etag}
        reading, writing = os.pipe()

        def race(
            name: bytes, key: str = key, condition: dict[str, str] = condition, go: int = reading
        ) -> bool:
            os.read(go, 1)
            write = getattr(LocalStore(tmp_path), method)
            return bool(write(key, name * 100_000, writer=name.decode(), **condition))

        names = [b"a", b"b", b"c", b"d", b"e", b"f"]
        pids = [fork(lambda name=name: race(name)) for name in names]  # type: ignore[misc]
        os.write(writing, b"......")
        won = [name for name, pid in zip(names, pids, strict=True) if exit_code(pid) == 0]
        os.close(reading)
        os.close(writing)
        assert len(won) == 1
        assert store.get(key) == won[0] * 100_000


CALLS = ["open", "fsync", "link", "replace", "unlink", "scandir", "stat", "mkdir"]


@FORKS
@pytest.mark.parametrize("method", ["put_if_absent", "put_if_match", "put"])
def test_a_process_killed_at_any_call_leaves_a_whole_object_or_none(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no lock: the next writer gets its turn."""
    old, killed = b"old" * 50_000, 0
    for fatal in range(40):
        store = LocalStore(tmp_path / f"{fatal}")
        store.put("another", b"")
        if method != "put_if_absent":
            store.put("unit", old)
        seen = store.head("unit")
        arguments: dict[str, str] = {} if method == "put" else {"writer": "me"}
        if method == "put_if_match":
            assert seen is not None
            arguments["etag"] = seen.etag

        def write(fatal: int = fatal, arguments: dict[str, str] = arguments) -> bool:
            left = [fatal]
            for name in CALLS:
                _kill_before_call(name, left)
            write = getattr(LocalStore(tmp_path / f"{fatal}"), method)
            return write("unit", b"new" * 50_000, **arguments) is not False

        code = exit_code(fork(write))
        killed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
        keys = [info.key for info in store.list()]
        before = ["another"] if seen is None else ["another", "unit"]
        assert keys in (before, ["another", "unit"])
        content = store.get("unit") if "unit" in keys else None
        assert content in ((old if seen else None), b"new" * 50_000)
        assert code or content == b"new" * 50_000
        if content is None:
            assert store.put_if_absent("unit", b"next", writer="next")
        else:
            newest = store.head("unit")
            assert newest is not None
            assert store.put_if_match("unit", b"next", etag=newest.etag, writer="next")
        if not code:
            break
    assert killed > 5


def _kill_before_call(name: str, left: list[int]) -> None:
    """Kills this process before the call after `left[0]` others, those of other names included."""
    real = getattr(os, name)

    def call(*arguments: Any, **named: Any) -> Any:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return real(*arguments, **named)

    setattr(os, name, call)


# Errors


@contextmanager
def failing(
    faults: list[tuple[str, int, bool]], *, before: dict[int, Callable[[], None]] | None = None
) -> Iterator[None]:
    """Calls of the named functions of `os` fail, each with the next fault for its name: number of
    the error, and whether the call was carried out. before: what happens before which call."""
    left, acts, number = list(faults), before or {}, [-1]

    def failing_call(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            number[0] += 1
            if number[0] in acts:
                acts[number[0]]()
            planned = next((fault for fault in left if fault[0] == name), None)
            if planned is None:
                return real(*arguments, **named)
            left.remove(planned)
            if planned[2]:
                real(*arguments, **named)
            raise OSError(planned[1], os.strerror(planned[1]))

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("link", "replace", "fsync"):
            patch.setattr(os, name, failing_call(name))
        yield


FAULTS = st.lists(
    st.tuples(
        st.sampled_from(["link", "replace", "fsync"]),
        st.sampled_from([errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOSPC]),
        st.booleans(),
    ),
    max_size=6,
)


@settings(max_examples=60)
@given(faults=FAULTS, rival=st.none() | st.integers(0, 8))
def test_a_create_is_ours_exactly_if_the_file_is(
    faults: list[tuple[str, int, bool]], rival: int | None
) -> None:
    """Over NFS an answer may be lost: the link is made, and the call fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "unit")

        def create() -> None:
            if not path.exists():
                path.write_bytes(b"them")

        acts = {} if rival is None else {rival: create}
        with failing(faults, before=acts):
            won = patient(Path(folder)).put_if_absent("unit", b"ours", writer="me")
        assert won == (path.read_bytes() == b"ours")
        assert os.listdir(folder) == ["unit"]


@settings(max_examples=60)
@given(faults=FAULTS, rival=st.booleans())
def test_a_replacement_is_ours_exactly_if_the_file_is(
    faults: list[tuple[str, int, bool]], rival: bool
) -> None:
    """A rival replaces the same version while the call waits for its second attempt."""
    with tempfile.TemporaryDirectory() as folder:
        store = patient(Path(folder))
        store.put("unit", b"old")
        seen = store.head("unit")
        assert seen is not None
        theirs: list[bool] = []

        def replace() -> None:
            theirs.append(store.put_if_match("unit", b"them", etag=seen.etag, writer="them"))

        clock = EventfulClock(0, replace) if rival else FakeClock()
        with failing(faults):
            won = patient(Path(folder), clock).put_if_match(
                "unit", b"ours", etag=seen.etag, writer="me"
            )
        assert won == (store.get("unit") == b"ours")
        assert won != any(theirs)
        assert store.head("unit") != seen


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"unit: .* on the disk at /.*; free space.*tried for 600"):
        patient(tmp_path).put_if_absent("unit", b"x", writer="me")
    assert os.listdir(tmp_path) == []


def test_a_disk_without_hard_links_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    clock = FakeClock()
    with pytest.raises(StoreError, match="no hard links"):
        patient(tmp_path, clock).put_if_absent("unit", b"x", writer="me")
    assert clock.time == 0
    assert os.listdir(tmp_path) == []


def test_rights_are_no_trouble_that_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    clock = FakeClock()
    with pytest.raises(StoreError, match="check the path and rights"):
        patient(tmp_path, clock).put("unit", b"x")
    assert clock.time == 0


# Mounts


def mounted(root: Path) -> None:
    (root / "folder").mkdir(parents=True, exist_ok=True)
    (root / "folder" / "x").write_bytes(b"0123")
    (root / "y").write_bytes(b"4567")


@pytest.fixture(params=["missing", "empty", "another"])
def away(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LocalStore, Path]:
    """A store whose root was mounted where it was pickled, and is away here."""
    root, aside = tmp_path / "mount", tmp_path / "aside"
    mounted(root)
    data = pickle.dumps(LocalStore(root))
    root.rename(aside)
    if request.param != "missing":
        root.mkdir()
    if request.param == "another":
        (root / "something").write_bytes(b"")

    def mount() -> None:
        if root.exists():
            root.rename(tmp_path / "below")
        aside.rename(root)

    store: LocalStore = pickle.loads(data)
    store._patience = Patience(seconds=60, clock=EventfulClock(20, mount))
    return store, root


CALLS_OF_A_STORE = [
    lambda store: store.get("y"),
    lambda store: store.get_range("folder/x", 0, 4),
    lambda store: store.head("y"),
    lambda store: store.list(),
    lambda store: store.put("z", b"1"),
    lambda store: store.put_if_absent("z", b"1", writer="me"),
]


@pytest.mark.parametrize("call", CALLS_OF_A_STORE)
def test_a_mount_that_is_away_is_no_missing_object(
    away: tuple[LocalStore, Path], call: Callable[[LocalStore], object]
) -> None:
    """A node without it would turn unit after unit into error rows, faster than any other node, or
    commit rows to its own disk."""
    store, root = away
    before = list(root.rglob("*"))
    with pytest.raises(StoreError, match="is it mounted") as caught:
        call(store.with_patience(0))
    assert not isinstance(caught.value, ObjectGone)
    assert list(root.rglob("*")) == before


@pytest.mark.parametrize("call", CALLS_OF_A_STORE)
def test_a_mount_that_comes_back_costs_time_alone(
    away: tuple[LocalStore, Path], call: Callable[[LocalStore], object]
) -> None:
    store, root = away
    assert call(store) not in (b"", [], False)
    assert sorted(path.name for path in root.iterdir() if path.name != "z") == ["folder", "y"]


def test_a_store_says_whether_it_is_on_this_machine(
    away: tuple[LocalStore, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, root = away
    assert not store.is_here()
    here = root.parent / "here"
    assert LocalStore(here).is_here(), "a new output is nowhere yet"
    mounted(here)
    known = pickle.loads(pickle.dumps(LocalStore(here)))
    assert known.is_here()

    monkeypatch.setattr("cluster.store.local._SEEN_WITHIN_S", 0.2)
    woken = threading.Event()
    monkeypatch.setattr("os.path.lexists", lambda path: woken.wait(30))
    assert not known.is_here(), "its server is gone, and whoever asks it sleeps"
    woken.set()


def test_a_drive_whose_nodes_number_inodes_differently_is_one_drive(tmp_path: Path) -> None:
    """As those of gcsfuse and mountpoint-s3 do, and copies of a corpus on each node."""
    here, there = tmp_path / "here", tmp_path / "there"
    mounted(here)
    data = pickle.dumps(LocalStore(here))
    shutil.copytree(here, there)
    shutil.rmtree(here)
    there.rename(here)
    store: LocalStore = pickle.loads(data)
    assert store.is_here()
    assert store.with_patience(0).get("y") == b"4567"


def test_a_folder_whose_files_all_changed_is_the_same_folder(tmp_path: Path) -> None:
    """As /tmp on a busy machine, for a corpus of one file in it."""
    mounted(tmp_path / "root")
    store = pickle.loads(pickle.dumps(LocalStore(tmp_path / "root")))
    shutil.rmtree(tmp_path / "root" / "folder")
    (tmp_path / "root" / "y").rename(tmp_path / "root" / "z")
    assert store.is_here()
    assert store.with_patience(0).get("z") == b"4567"


def test_a_file_that_links_lead_to_is_listed_once_and_by_its_own_name(tmp_path: Path) -> None:
    mounted(tmp_path / "root")
    (tmp_path / "outside").write_bytes(b"89")
    for name, end in {"a": "y", "b": "folder/x", "c": "../outside", "d": "../outside"}.items():
        (tmp_path / "root" / name).symlink_to(end)
    with capture_logs() as events:
        assert [info.key for info in LocalStore(tmp_path / "root").list()] == ["c", "folder/x", "y"]
    assert [event["uri"].rpartition("/")[2] for event in events] == ["a", "b", "d"]


@pytest.mark.parametrize("end", ["nowhere", "x.parquet"])
def test_a_link_that_leads_nowhere_is_named_where_its_object_is_wanted(
    tmp_path: Path, end: str
) -> None:
    """Its rows would be missing without a word where the other drive is not mounted."""
    mounted(tmp_path)
    (tmp_path / "x.parquet").symlink_to(end)
    store = LocalStore(tmp_path).with_patience(0)
    assert [info.key for info in store.list(suffixes=("y",))] == ["y"]
    with pytest.raises(StoreError, match=r"x\.parquet is a link: .*; mount what it leads to"):
        store.list(suffixes=(".parquet",))


def test_a_prefix_is_listed_without_looking_beside_it(tmp_path: Path) -> None:
    mounted(tmp_path)
    for name in ("yes", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"")
    looked: list[str] = []
    scandir = os.scandir

    def scan(path: str | Path) -> Any:
        looked.append(Path(path).name)
        return scandir(path)

    with patch("os.scandir", scan):
        assert [info.key for info in LocalStore(tmp_path).list("y")] == ["y", "yes/file"]
    assert set(looked) == {tmp_path.name, "yes"}


def test_an_object_that_was_removed_is_gone(tmp_path: Path) -> None:
    mounted(tmp_path)
    store = pickle.loads(pickle.dumps(patient(tmp_path)))
    (tmp_path / "folder" / "x").unlink()
    with pytest.raises(ObjectGone, match="no such file"):
        store.get_range("folder/x", 0, 4)
    with pytest.raises(ObjectGone):
        store.get("never/there")
    assert store.head("folder/x") is None


def test_a_corpus_of_which_nothing_is_there_is_not_mounted(tmp_path: Path) -> None:
    """Also for a store that is new here: no unit was planned from an empty folder."""
    with pytest.raises(StoreError, match="is it mounted") as caught:
        LocalStore(tmp_path).with_patience(0).get("x")
    assert not isinstance(caught.value, ObjectGone)


def test_a_mount_that_goes_away_in_the_middle_of_a_listing_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "mount"
    mounted(root)
    real = os.walk

    def walk(*arguments: Any, **named: Any) -> Iterator[Any]:
        for number, step in enumerate(real(*arguments, **named)):
            if number == 1:
                root.rename(tmp_path / "aside")
            yield step

    monkeypatch.setattr(os, "walk", walk)
    store = LocalStore(root).with_patience(0)
    with pytest.raises(StoreError, match="is it mounted"):
        store.list()


# Other files


def test_only_files_are_objects(tmp_path: Path) -> None:
    """A pipe would be read for ever."""
    store = patient(tmp_path)
    store.put("folder/x", b"1")
    os.mkfifo(tmp_path / "pipe")
    assert [info.key for info in store.list()] == ["folder/x"]
    assert store.head("folder") is None
    for key in ("pipe", "folder"):
        with pytest.raises(ObjectGone):
            store.get(key)


def test_a_file_that_changes_while_it_is_read_is_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = patient(tmp_path)
    store.put("x", b"0" * 100)
    real, calls = os.fstat, []

    def fstat(descriptor: int) -> os.stat_result:
        calls.append(descriptor)
        if len(calls) == 2:
            with (tmp_path / "x").open("ab") as file:
                file.write(b"more")
        return real(descriptor)

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(ObjectGone, match="changed while"):
        store.get("x")
