"""Whether a path can be a folder that takes writes, found out by making one there."""

from __future__ import annotations

import errno
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

from cluster.store.local_errors import LinkToNothing

# A file is in the way, or no name there can be a folder's. ENOENT: the folder above is there, and
# one in it can still not be made, as in /proc.
_NEVER: Final = {errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR}


def try_folder(folder: Path) -> None:
    """Makes a hidden folder in this one, and those above it that are missing, and removes all that
    it made. Raises OSError; see `can_never_be`."""
    made: list[Path] = []
    try:
        _make(folder / f".{uuid.uuid4().hex}.tmp", made)
    finally:
        for each in reversed(made):
            with suppress(OSError):  # another process writes there by now
                each.rmdir()


def can_never_be(error: OSError) -> bool:
    """Whether an error of `try_folder`, if it stays, means that the path is no folder's: neither
    rights nor room would make it one."""
    return not isinstance(error, LinkToNothing) and error.errno in _NEVER


def _make(folder: Path, made: list[Path]) -> None:
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():  # below a file it would be ENOTDIR
            raise LinkToNothing(f"{folder} is a link: No such folder") from None
        return
    except FileNotFoundError:
        _make(folder.parent, made)
        folder.mkdir(exist_ok=True)
    made.append(folder)
