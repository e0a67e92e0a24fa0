"""What the errors of a file system mean: which of them pass, and what to do about the others."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from cluster.errors import StoreError

# A server or a network is away; tables or disks are full, which others may empty; a folder was
# removed under a write that had just made it. Readers handle ENOENT themselves.
_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EDQUOT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.EMFILE,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.ENODEV,
    errno.ENOENT,
    errno.ENOLCK,
    errno.ENOSPC,
    errno.ENOTCONN,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
_FULL = {errno.ENOSPC, errno.EDQUOT}


class NoHardLinks(OSError):
    """The file system cannot make one."""


class NotMounted(OSError):
    """The directory of a store is not what it was; on this node it may not be mounted."""


class LinkToNothing(OSError):
    """A link whose end is not there; the drive that it leads to may not be mounted."""


class LockHeld(OSError):
    """Another process has the lock of a folder."""


def passing_reason(error: Exception) -> str | None:
    """The name of an error that may pass; None for one that waiting does not mend."""
    if isinstance(error, NotMounted | LinkToNothing | LockHeld):
        return type(error).__name__
    if isinstance(error, OSError) and error.errno in _PASSING:
        return errno.errorcode[error.errno]
    return None


def store_error(error: OSError, path: Path, patience: float) -> StoreError:
    """The error for people. patience: seconds that it was given."""
    waited = f" (tried for {patience:.0f} s)" if passing_reason(error) and patience else ""
    # An operation with two names, as a link, or a walk names the folder that it was about.
    failed = Path(os.fsdecode(error.filename)) if error.filename else path
    where = path if failed.name.startswith(".") else failed
    if isinstance(error, NotMounted):
        return StoreError(f"{path}: {error}; is it mounted on this machine?{waited}")
    if isinstance(error, LinkToNothing):
        return StoreError(f"{error}; mount what it leads to, or remove it{waited}")
    if isinstance(error, LockHeld):
        return StoreError(f"{path}: {error}; end it if it hangs (`lsof` names it){waited}")
    if error.errno in _FULL:
        return StoreError(
            f"{path}: {error.strerror} on the disk at {_mount_of(path)}; free space there{waited}"
        )
    if isinstance(error, NoHardLinks):
        return StoreError(
            f"{path}: {error.strerror}; the disk at {_mount_of(path)} has no hard links, which "
            "commits need: give a path on another, or s3://bucket/prefix"
        )
    return StoreError(f"{where}: {error.strerror or error}; check the path and rights{waited}")


def _mount_of(path: Path) -> Path:
    """The mount point that holds the path."""
    while not os.path.ismount(path) and path != path.parent:
        path = path.parent
    return path
