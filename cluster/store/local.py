"""Objects as files under a directory."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ObjectGone, StoreError
from cluster.store.base import ObjectInfo, Store


class LocalStore(Store):
    """Files under `root`. Names starting with `.` are never listed: unfinished files have them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.uri = str(root)

    def list(self, prefix: str = "", suffixes: Sequence[str] = ()) -> list[ObjectInfo]:
        found = []
        # Walk from the deepest directory the prefix names, so that a narrow listing stays cheap.
        top = self._root / prefix.rpartition("/")[0]
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self._root).as_posix()
                if name.startswith(".") or not key.startswith(prefix):
                    continue
                if suffixes and not key.endswith(tuple(suffixes)):
                    continue
                info = self.head(key)
                if info is not None:
                    found.append(info)
        return sorted(found, key=lambda info: info.key)

    def head(self, key: str) -> ObjectInfo | None:
        try:
            stat = (self._root / key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._error(key, error) from error
        return ObjectInfo(key=key, size=stat.st_size, etag=_etag(stat))

    def get(self, key: str) -> bytes:
        with self._translated(key):
            return (self._root / key).read_bytes()

    def get_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        with self._translated(key), (self._root / key).open("rb") as file:
            if etag is not None and _etag(os.fstat(file.fileno())) != etag:
                raise ObjectGone(f"{self.uri_of(key)}: changed since it was listed")
            file.seek(start)
            return file.read(max(0, stop - start))

    def put(self, key: str, data: bytes) -> None:
        with self._translated(key), self._written(key, data) as temporary:
            temporary.replace(self._root / key)

    def put_if_absent(self, key: str, data: bytes, *, writer: str) -> bool:
        # A hard link, unlike a rename, fails where the name is taken.
        with self._translated(key), self._written(key, data) as temporary:
            try:
                os.link(temporary, self._root / key)
            except FileExistsError:
                return False
        return True

    @contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[Path]:
        """A finished, synced temporary file in the key's directory; it is gone afterwards."""
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
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ObjectGone(f"{self.uri_of(key)}: no such file") from error
        except OSError as error:
            raise self._error(key, error) from error

    def _error(self, key: str, error: OSError) -> StoreError:
        return StoreError(f"{self.uri_of(key)}: {error.strerror}; check the path, space and rights")


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"
