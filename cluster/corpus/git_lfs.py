"""Files of a Git repository that were never fetched: what stands in their place is a pointer."""

from __future__ import annotations

from cluster.errors import UsageError

_POINTER = b"version https://git-lfs.github.com/spec/v1"
POINTER_BYTES = len(_POINTER)
"""How many of a file's first bytes tell."""


def check_not_pointer(beginning: bytes, uri: str) -> None:
    """Raises UsageError where a file begins as the pointers of Git LFS do."""
    if beginning.startswith(_POINTER):
        raise UsageError(
            f"{uri}: this is a Git LFS pointer, not the file itself; fetch the files first: "
            "git lfs pull, in the repository"
        )
