"""A pointer of Git LFS in place of a file is told apart from a damaged file."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from cluster.corpus.git_lfs import check_not_pointer
from cluster.errors import UsageError
from cluster.store import open_store
from tests.cluster.corpora import plan, put_parquet, tar_bytes

POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


@pytest.mark.parametrize("name", ["b.parquet", "b.tar"])
def test_a_pointer_among_the_files_is_refused_at_planning_with_the_command_to_type(
    tmp_path: Path, name: str
) -> None:
    corpus = open_store(str(tmp_path / "in"))
    if name == "b.tar":
        corpus.put("a.tar", tar_bytes([("a.jpg", b"j")]))
    else:
        put_parquet(corpus, "a.parquet", pa.table({"image": [b"j"]}))
    corpus.put(name, POINTER)
    with pytest.raises(UsageError, match=rf"in/{name}: this is a Git LFS pointer.*git lfs pull"):
        plan(corpus.uri, str(tmp_path / "out"))


def test_an_empty_file_is_no_pointer(tmp_path: Path) -> None:
    corpus = open_store(str(tmp_path / "in"))
    corpus.put("a.parquet", b"")
    with pytest.raises(UsageError, match=r"a\.parquet: not a Parquet file"):
        plan(corpus.uri, str(tmp_path / "out"))


def test_a_text_about_pointers_is_none() -> None:
    check_not_pointer(POINTER[1:], "a.tar")
    check_not_pointer(b"", "a.tar")
