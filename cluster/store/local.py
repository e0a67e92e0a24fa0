"""Objects as files under a directory.

Guarantees: a file appears under its name complete and synced to disk, because it is written under a
temporary name first; create-if-absent is a hard link, which fails if the name exists. Needs a file
system with hard links.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ObjectGone, StoreError
from cluster.store.base import ObjectInfo, Store


class LocalStore(Store):
    """Files under `root`, linked files and folders included; a folder that several ways lead to is
    listed once. Names that start with `.` are never listed: temporary files have them.

    The etag is size and modification time, so a file is not read to list it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.uri = str(root)

    def list(self, prefix: str = "", suffixes: Sequence[str] = ()) -> list[ObjectInfo]:
        found = []
        # The walk starts at the deepest directory of the prefix, so that its cost is that of the
        # objects listed.
        top = self._root / prefix.rpartition("/")[0]
        for folder, names in self._walk(top):
            for name in names:
                key = (folder / name).relative_to(self._root).as_posix()
                if name.startswith(".") or not key.startswith(prefix):
                    continue
                if suffixes and not key.endswith(tuple(suffixes)):
                    continue
                info = self.head(key)
                if info is not None:
                    found.append(info)
        return sorted(found, key=lambda info: info.key)

    def _walk(self, top: Path) -> Iterator[tuple[Path, Sequence[str]]]:
        """Each folder below `top` once, with the names of its files. Links are followed after the
        folders that stand there themselves, which so keep their keys; loops of links end."""
        starts, seen = [top], set[tuple[int, int]]()
        for start in starts:  # which grows
            for folder, folders, names in os.walk(start, onerror=self._raise_unlistable):
                stat = os.stat(folder)
                visible = [name for name in sorted(folders) if not name.startswith(".")]
                links = {name for name in visible if Path(folder, name).is_symlink()}
                folders[:] = [name for name in visible if name not in links]
                if (stat.st_dev, stat.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((stat.st_dev, stat.st_ino))
                starts += [Path(folder, name) for name in sorted(links)]
                yield Path(folder), names

    def head(self, key: str) -> ObjectInfo | None:
        try:
            stat = (self._root / key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._error(key, error) from error
        return ObjectInfo(key=key, size=stat.st_size, etag=_etag(stat))

    def get(self, key: str) -> bytes:
        with self._translate_errors(key):
            return (self._root / key).read_bytes()

    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        with self._translate_errors(key), (self._root / key).open("rb") as file:
            if etag is not None and _etag(os.fstat(file.fileno())) != etag:
                raise ObjectGone(f"{self.uri_of(key)}: changed since it was listed")
            file.seek(start)
            return file.read(max(0, stop - start))

    def put(self, key: str, data: bytes) -> None:
        with self._translate_errors(key), self._write_temporary(key, data) as temporary:
            temporary.replace(self._root / key)

    def put_if_absent(self, key: str, data: bytes, *, writer: str) -> bool:
        # Unlike a rename, a hard link fails if the name exists.
        with self._translate_errors(key), self._write_temporary(key, data) as temporary:
            try:
                os.link(temporary, self._root / key)
            except FileExistsError:
                return False
        return True

    def put_if_match(self, key: str, data: bytes, *, etag: str, writer: str) -> bool:
        path = self._root / key
        if not path.exists():
            return False
        with self._translate_errors(key), self._lock(path.parent):
            before = path.stat()
            if _etag(before) != etag:
                return False
            with self._write_temporary(key, data) as temporary:
                if _etag(temporary.stat()) == etag:
                    # As long as the old one, and within one tick of the file system's clock.
                    later = before.st_mtime_ns + 2 * 10**9
                    os.utime(temporary, ns=(later, later))
                temporary.replace(path)
        return True

    @contextmanager
    def _lock(self, folder: Path) -> Iterator[None]:
        """One at a time among the processes of all machines that replace objects in `folder`. The
        lock ends with its process; the file stays, hidden, because removing it would be a race."""
        with (folder / ".replace.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _write_temporary(self, key: str, data: bytes) -> Iterator[Path]:
        """Yields a complete, synced temporary file in the key's directory, and removes it after."""
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _translate_errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ObjectGone(f"{self.uri_of(key)}: no such file") from error
        except OSError as error:
            raise self._error(key, error) from error

    def _raise_unlistable(self, error: OSError) -> None:
        """Raises for a folder that cannot be read; `os.walk` would leave it out. Absent ones, and
        the folder that every ext4 volume keeps for itself, hold no objects."""
        folder = Path(error.filename)
        absent = isinstance(error, FileNotFoundError | NotADirectoryError)
        if not absent and folder.name != "lost+found":
            raise self._error(folder.relative_to(self._root).as_posix(), error) from error

    def _error(self, key: str, error: OSError) -> StoreError:
        return StoreError(f"{self.uri_of(key)}: {error.strerror}; check the path, space and rights")


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"
