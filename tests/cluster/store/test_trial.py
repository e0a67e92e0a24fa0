"""Whether a path can hold an output: found out before anything is planned, and without a trace."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import StoreError, UsageError
from cluster.output.run_output import RunOutput
from cluster.store import LocalStore, Patience, open_store
from tests.cluster.store.clock import EventfulClock, FakeClock


def contents(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def check(root: Path, clock: FakeClock | None = None) -> None:
    patience = Patience(seconds=30, clock=clock or FakeClock())
    LocalStore(root, patience=patience).check_place()


@pytest.mark.parametrize("place", [".", "new", "new/and/deep", "there", "there/new", "link/new"])
def test_a_folder_that_can_be_made_is_taken_and_not_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    before = contents(tmp_path)
    check(tmp_path / place)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("file", "Not a directory"),
        ("file/x/y", "Not a directory"),
        ("link to a file", "Not a directory"),
        ("loop/x", "symbolic links"),
        ("n" * 300, "too long"),
    ],
)
def test_what_can_never_be_a_folder_is_a_usage_error_at_once(
    tmp_path: Path, place: str, why: str
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link to a file").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    before, clock = contents(tmp_path), FakeClock()
    with pytest.raises(UsageError, match=rf"can never be a folder: .*{why}.*s3://bucket/prefix"):
        check(tmp_path / place, clock)
    assert clock.time == 0
    assert contents(tmp_path) == before


def refuse_folders(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """No folder can be made any more, those that are there are found."""
    make: Callable[..., None] = os.mkdir

    def refuse(path: Any, *args: Any) -> None:
        if Path(path).parent.is_dir() and not Path(path).is_dir():
            raise OSError(code, os.strerror(code), str(path))
        make(path, *args)

    monkeypatch.setattr(os, "mkdir", refuse)


def test_a_file_system_that_makes_no_folders_is_a_usage_error_within_the_first_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc says that the folder above is missing, which elsewhere passes."""
    refuse_folders(monkeypatch, errno.ENOENT)
    clock = FakeClock()
    with pytest.raises(UsageError, match="can never be a folder: No such file or directory"):
        check(tmp_path / "nope/x", clock)
    assert clock.time == 30


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_rights_and_room_are_the_store_s_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """They can be mended, and the same command then goes on."""
    refuse_folders(monkeypatch, code)
    with pytest.raises(StoreError, match=os.strerror(code)):
        check(tmp_path / "x")


def test_a_link_whose_drive_is_not_mounted_yet_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("drive")
    with pytest.raises(StoreError, match="link is a link: No such folder; mount what it leads to"):
        check(tmp_path / "link")
    check(tmp_path / "link", EventfulClock(10, (tmp_path / "drive").mkdir))
    assert not list((tmp_path / "drive").iterdir())


def test_another_driver_s_first_write_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Callable[..., None] = os.mkdir

    def make_and_use(path: Any, *args: Any) -> None:
        make(path, *args)
        if Path(path).name == "out":
            (tmp_path / "out/manifest").write_bytes(b"theirs")

    monkeypatch.setattr(os, "mkdir", make_and_use)
    check(tmp_path / "out")
    assert (tmp_path / "out/manifest").read_bytes() == b"theirs"


def test_an_output_that_holds_a_run_needs_no_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run on a drive that is read alone is reported by the command that made it."""
    open_store(tmp_path / "out").put("_run/manifest.json", b"{}")
    refuse_folders(monkeypatch, errno.EROFS)
    RunOutput.open(tmp_path / "out").check_place()
    with pytest.raises(StoreError, match="Read-only"):
        RunOutput.open(tmp_path / "new").check_place()


def test_a_bucket_is_taken_unasked() -> None:
    open_store("s3://no-such-bucket/x").check_place()
