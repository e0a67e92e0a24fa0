"""Objects as files under a directory, of one machine or of a mount that many share.

Guarantees: a file appears under its name complete and synced to disk, because it is written under a
temporary name first; create-if-absent is a hard link, which fails if the name exists, on NFS too; a
directory that is not mounted on this node is trouble that may pass, not a missing object.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from stat import S_IMODE, S_ISREG
from typing import Any, Final, TypeAlias, TypeVar

import structlog

from cluster.errors import ObjectGone, UsageError
from cluster.store.base import ObjectInfo, Store
from cluster.store.held_calls import HELD_S, LISTING_HELD_S, watched
from cluster.store.local_errors import (
    LinkToNothing,
    LockHeld,
    NoHardLinks,
    NotMounted,
    passing_reason,
    store_error,
)
from cluster.store.patience import Patience
from cluster.store.trial import can_never_be, try_folder

logger = structlog.get_logger(__name__)

_T = TypeVar("_T")

_REMEMBERED_NAMES: Final = 16
_SEEN_WITHIN_S: Final = 20.0
_OF_EVERY_DISK: Final = "lost+found"

_File: TypeAlias = tuple[int, int, int]
"""What tells a file from every other that had or will have its name: inode, size and time."""


class LocalStore(Store):
    """Files under `root`, linked files and folders included; a folder that several links lead to is
    listed once. Names that start with `.` are never listed: temporary files have them, also those
    that a killed process left.

    The etag is size and modification time, so a file is not read to list it. A store that has seen
    its root with something in it, here or in the process that pickled it, expects the same
    directory again: by some of the same names in it, since nodes of one network drive may number
    its inodes differently, or, where these were all removed, by its inode.
    """

    def __init__(self, root: Path, *, patience: Patience | None = None) -> None:
        super().__init__(str(root), patience)
        self._root = root
        self._names: tuple[str, ...] = ()
        self._directory: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        with suppress(OSError):
            self._look_at_root()
        return self.__dict__

    def list(self, prefix: str = "", suffixes: Sequence[str] = ()) -> list[ObjectInfo]:
        def attempt() -> list[ObjectInfo]:
            self._check_mounted(before_use=True)
            found = list(self._listed(prefix, tuple(suffixes)))
            self._check_mounted(before_use=True)  # still: else the walk ended early
            return sorted(found, key=lambda info: info.key)

        return self._call(prefix, attempt, held_s=LISTING_HELD_S)

    def _listed(self, prefix: str, suffixes: tuple[str, ...]) -> Iterator[ObjectInfo]:
        links: list[str] = []
        walked: dict[str, Path] = {}

        def is_listed(key: str) -> bool:
            return (
                not key.rpartition("/")[2].startswith(".")
                and key.startswith(prefix)
                and key.endswith(suffixes or "")
            )

        for folder, names in self._walk(prefix, walked):
            for name in names:
                key = self._key(folder / name)
                if not is_listed(key):
                    continue
                if (folder / name).is_symlink():
                    links.append(key)
                    continue
                stat = self._stat(key)
                if stat is not None:
                    yield ObjectInfo(key=key, size=stat.st_size, etag=_etag(stat))
        linked = set[str]()
        for key in sorted(links):  # the same one of several at each listing
            try:
                stat = (self._root / key).stat()
            except OSError as error:  # what it leads to may be on a drive that is not mounted
                raise LinkToNothing(f"{self.uri_of(key)} is a link: {error.strerror}") from error
            if not S_ISREG(stat.st_mode):
                continue
            target = Path(os.path.realpath(self._root / key))
            folder_of_it = walked.get(str(target.parent))
            if str(target) in linked or (
                folder_of_it is not None and is_listed(self._key(folder_of_it / target.name))
            ):
                logger.warning("link_ignored", uri=self.uri_of(key), reason="its file is listed")
                continue
            linked.add(str(target))
            yield ObjectInfo(key=key, size=stat.st_size, etag=_etag(stat))

    def _key(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _walk(self, prefix: str, walked: dict[str, Path]) -> Iterator[tuple[Path, Sequence[str]]]:
        """Each folder once that holds keys of the prefix, with the names of its files. Links are
        followed after the folders that stand there themselves, which so keep their keys; loops of
        links end.

        walked: gets each folder by its path without links. Inodes would not do: file systems that
        unite others (virtiofs, mergerfs) give one to several folders."""
        # From the deepest directory of the prefix on, so that the cost is that of what is listed.
        top = self._root / prefix.rpartition("/")[0]
        starts = [top]
        for start in starts:  # which grows
            for folder, folders, names in os.walk(start, onerror=_raise_unlistable):
                visible = [
                    name
                    for name in sorted(folders)
                    if not name.startswith(".") and self._may_hold(Path(folder, name), prefix)
                ]
                links = {name for name in visible if Path(folder, name).is_symlink()}
                folders[:] = [name for name in visible if name not in links]
                real = os.path.realpath(folder)
                if real in walked:
                    logger.warning("link_ignored", uri=folder, reason="its folder is listed")
                    folders.clear()
                    continue
                walked[real] = Path(folder)
                starts += [Path(folder, name) for name in sorted(links)]
                yield Path(folder), names

    def _may_hold(self, folder: Path, prefix: str) -> bool:
        """Whether keys below the folder may start with the prefix."""
        keys = f"{folder.relative_to(self._root).as_posix()}/"
        return keys.startswith(prefix) or prefix.startswith(keys)

    def head(self, key: str) -> ObjectInfo | None:
        def attempt() -> ObjectInfo | None:
            stat = self._stat(key)
            if stat is None:
                self._check_mounted(before_use=True)
                return None
            return ObjectInfo(key=key, size=stat.st_size, etag=_etag(stat))

        return self._call(key, attempt)

    def get(self, key: str) -> bytes:
        return self._call(key, lambda: self._read(key, 0, None, None))

    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        return self._call(key, lambda: self._read(key, start, max(start, stop), etag))

    def _read(self, key: str, start: int, stop: int | None, etag: str | None) -> bytes:
        """Bytes [start, stop) of the file, to its end for None, all of one version."""
        try:
            if self._stat(key) is None:  # a pipe, for example, would never open
                raise FileNotFoundError
            file = (self._root / key).open("rb")
        except FileNotFoundError as error:
            self._check_mounted(before_use=False)
            raise ObjectGone(f"{self.uri_of(key)}: no such file") from error
        with file:
            before = os.fstat(file.fileno())
            if etag not in (None, _etag(before)):
                raise ObjectGone(f"{self.uri_of(key)}: changed since it was listed")
            stop = before.st_size if stop is None else min(stop, before.st_size)
            file.seek(start)
            data = file.read(max(0, stop - start))
            after = os.fstat(file.fileno())
        if _etag(after) != _etag(before):
            raise ObjectGone(f"{self.uri_of(key)}: changed while it was read")
        if len(data) != max(0, stop - start):
            raise OSError(errno.EIO, "the file is shorter than its size")
        return data

    def put(self, key: str, data: bytes) -> None:
        def attempt() -> None:
            with self._temporary(key, data) as temporary:
                temporary.replace(self._root / key)

        self._call(key, attempt)

    def put_if_absent(self, key: str, data: bytes, *, writer: str) -> bool:
        path, written = self._root / key, set[_File]()

        def attempt() -> bool:
            if not _is_one_of(written, path):
                with self._temporary(key, data) as temporary:
                    written.add(_file(temporary.stat()))
                    # Unlike a rename, a hard link fails if the name exists. Over NFS the answer may
                    # be lost and the link made twice: then the name that exists is our own.
                    try:
                        _link(temporary, path)
                    except FileExistsError:
                        return _is_one_of(written, path)
            _sync_folder(path.parent)
            return True

        return self._call(key, attempt)

    def put_if_match(self, key: str, data: bytes, *, etag: str, writer: str) -> bool:
        path, written = self._root / key, set[_File]()

        def attempt() -> bool:
            if self._stat(key) is None:
                self._check_mounted(before_use=True)
                return False
            # Written before the lock is taken, which so is held for moments.
            with self._temporary(key, data) as temporary, self._lock(path.parent):
                before = self._stat_open(key)
                if not _is_one_of(written, path):
                    if before is None or _etag(before) != etag:
                        return False
                    if _etag(temporary.stat()) == etag:
                        # As long as the old one, within one tick of the file system's clock.
                        later = before.st_mtime_ns + 2 * 10**9
                        os.utime(temporary, ns=(later, later))
                    written.add(_file(temporary.stat()))
                    temporary.replace(path)
            _sync_folder(path.parent)
            return True

        return self._call(key, attempt)

    @contextmanager
    def _lock(self, folder: Path) -> Iterator[None]:
        """One at a time among the processes of all machines that replace objects in `folder`. The
        lock ends with its process; the file stays, hidden, because removing it would be a race.
        Raises LockHeld while another has it: a process that was stopped may hold it for ever."""
        path = folder / ".replace.lock"
        try:
            file = path.open("a")
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: the lock {path}") from error
        with file:
            with suppress(OSError):  # another user's, who let others write or did not
                os.fchmod(file.fileno(), S_IMODE(folder.stat().st_mode) & 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LockHeld(f"another process holds {path}") from error
            yield

    @contextmanager
    def _temporary(self, key: str, data: bytes) -> Iterator[Path]:
        """Yields a complete, synced temporary file in the key's directory, and removes it after."""
        self._check_mounted(before_use=True)
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            # What remains is hidden; it must not turn a write that was made into a failed one.
            with suppress(OSError):
                temporary.unlink()

    def _stat(self, key: str) -> os.stat_result | None:
        """The file's; None if there is no file of this name."""
        try:
            stat = (self._root / key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return stat if S_ISREG(stat.st_mode) else None

    def _stat_open(self, key: str) -> os.stat_result | None:
        """The file's, of an open file: NFS answers for a name from a cache of seconds, and asks the
        server where a file is opened."""
        if self._stat(key) is None:
            return None
        try:
            with (self._root / key).open("rb") as file:
                return os.fstat(file.fileno())
        except FileNotFoundError:
            return None

    def check_place(self) -> None:
        try:
            self._repeat(lambda: try_folder(self._root))
        except OSError as error:
            if can_never_be(error):
                raise UsageError(
                    f"{self.uri} can never be a folder: {error.strerror}; give another path, or "
                    "s3://bucket/prefix"
                ) from error
            raise store_error(error, self._root, self._patience.seconds) from error

    # Mounts

    def is_here(self) -> bool:
        if not self._names:
            return True
        # In a thread: a network drive whose server is gone holds whoever asks for as long.
        found: list[bool] = []

        def ask() -> None:
            with suppress(OSError):
                found.append(self._look_at_root())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_SEEN_WITHIN_S)
        return found == [True]

    def _look_at_root(self) -> bool:
        """Whether the root holds anything, and is what it was before. The first time that it holds
        something, that is remembered."""
        if any(os.path.lexists(self._root / name) for name in self._names):
            return True
        try:
            with os.scandir(self._root) as entries:
                found = (entry.name for entry in entries)
                visible = (n for n in found if not n.startswith(".") and n != _OF_EVERY_DISK)
                names = tuple(islice(visible, _REMEMBERED_NAMES))
            stat = os.stat(self._root)
        except (FileNotFoundError, NotADirectoryError):
            return False
        directory = (stat.st_dev, stat.st_ino)
        if names and not self._names:
            self._names, self._directory = names, directory
        return bool(names) and directory == self._directory

    def _check_mounted(self, *, before_use: bool) -> None:
        """Raises NotMounted where the root is missing, empty, or not the directory it was: on a
        node without the mount a path leads to nothing, or to the empty folder below the mount.

        before_use: a root that never held anything is accepted, because a new output has none.
        """
        if not self._look_at_root() and (self._names or not before_use):
            raise NotMounted("missing, empty or another directory here")

    def _call(self, key: str, attempt: Callable[[], _T], *, held_s: float = HELD_S) -> _T:
        try:
            return self._repeat(attempt, held_s)
        except OSError as error:
            raise store_error(error, self._root / key, self._patience.seconds) from error

    def _repeat(self, attempt: Callable[[], _T], held_s: float = HELD_S) -> _T:
        """The result of `attempt`, repeated within the store's patience. Raises its last error."""

        def seen() -> _T:
            with watched(self.uri, self._patience.seconds, held_s=held_s):
                return attempt()

        return self._patience.retry(self.uri, seen, passing_reason)


def _file(stat: os.stat_result) -> _File:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _is_one_of(written: set[_File], path: Path) -> bool:
    """Whether the file at `path` is one that this call wrote: an earlier attempt did it, and its
    answer was lost."""
    try:
        return bool(written) and _file(path.stat()) in written
    except FileNotFoundError:
        return False


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise NoHardLinks(error.errno, error.strerror) from error
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unlistable(error: OSError) -> None:
    """Raises for a folder that cannot be read; `os.walk` would leave it out. Absent ones, and the
    folder that every ext4 volume keeps for itself, hold no objects."""
    absent = isinstance(error, FileNotFoundError | NotADirectoryError)
    if not absent and Path(error.filename).name != _OF_EVERY_DISK:
        raise error


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"
