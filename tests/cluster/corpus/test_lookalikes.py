"""No file that looks like data of a corpus is left out without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cluster.config import CorpusFormat
from cluster.corpus.lookalikes import other_cases
from cluster.errors import UsageError
from cluster.store import Store, open_store
from tests.cluster.corpora import image, plan, put_parquet, tar_bytes

OTHER_PARQUET = ["b.pq", "c.parq", "d.PQ", "f.parquet.gz", "h.parquet.snappy", "i.parquet.part"]
OTHER_TARS = ["images.zip", "I.ZIP", "x.7z", "x.tar.lz4", "x.tar.part", "x.tbz2"]
OTHERS = ["notes.txt", "a.json", "data.csv", "parquet", "zip", "a.parquet.md5"]
HIDDEN = ["_old.pq", "_temporary/b.pq", ".cache/b.zip", "_delta/x.tar.part"]


@pytest.fixture
def corpus(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "in"))
    put_parquet(store, "a.parquet", pa.table({"image": [image()]}))
    return store


def warned(corpus: Store, output: Path | str, **options: Any) -> list[tuple[int, str]]:
    """Count and first name of each warning, where the run is planned."""
    with capture_logs() as events:
        planned = plan(corpus.uri, str(output), **options)
    assert len({unit.file for unit in planned.units}) == 1
    return [
        (event["files"], event["first"])
        for event in events
        if event["event"] == "files_of_other_names_not_read"
    ]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_files_that_look_like_data_and_are_not_read_are_counted_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    store = open_store(str(folder / "in"))
    tars = data.draw(st.booleans())
    put = data.draw(st.sets(st.sampled_from([*OTHER_PARQUET, *OTHER_TARS, *OTHERS, *HIDDEN])))
    format: CorpusFormat | None = data.draw(
        st.sampled_from([None, "webdataset" if tars else "parquet"])
    )
    if tars:
        store.put("s/a.tar", tar_bytes([("a.jpg", b"x")]))
    else:
        put_parquet(store, "s/a.parquet", pa.table({"image": [image()]}))
    for name in put:
        store.put(name, b"x")
    looked_for = {
        None: [*OTHER_PARQUET, *OTHER_TARS], "parquet": OTHER_PARQUET, "webdataset": OTHER_TARS
    }[format]  # fmt: skip
    unread = sorted(put & set(looked_for))
    expected = [(len(unread), unread[0])] if unread else []
    assert warned(store, folder / "out", format=format) == expected
    assert warned(store, folder / "out", format=format) == [], "once, where the run is planned"


@given(st.sampled_from([".parquet", ".tar"]), st.data())
def test_another_case_of_a_suffix_is_no_other_file_type(suffix: str, data: st.DataObject) -> None:
    upper = data.draw(st.lists(st.booleans(), min_size=len(suffix), max_size=len(suffix)))
    spelled = "".join(c.upper() if up else c for c, up in zip(suffix, upper, strict=True))
    assert (spelled in other_cases(suffix)) == (spelled != suffix)


@pytest.mark.parametrize("name", ["g.pArquet", "g.PARQUET", "s.tAr"])
def test_a_suffix_of_any_case_is_refused(corpus: Store, tmp_path: Path, name: str) -> None:
    corpus.put(name, b"x")
    with pytest.raises(UsageError, match=rf"{name}: files are known by .* in lower case"):
        plan(corpus.uri, str(tmp_path / "out"))


def test_a_run_that_was_begun_over_a_suffix_of_another_case_goes_on(
    corpus: Store, tmp_path: Path
) -> None:
    planned = plan(corpus.uri, str(tmp_path / "out"))
    corpus.put("g.pArquet", b"x")
    assert plan(corpus.uri, str(tmp_path / "out")).manifest == planned.manifest


def test_what_lies_beside_a_single_file_is_not_looked_at(corpus: Store, tmp_path: Path) -> None:
    corpus.put("b.pq", b"x")
    with capture_logs() as events:
        plan(f"{corpus.uri}/a.parquet", str(tmp_path / "out"))
    assert [event["event"] for event in events] == ["run_planned"]


def test_a_link_of_such_a_name_that_leads_nowhere_is_no_trouble(
    corpus: Store, tmp_path: Path
) -> None:
    (tmp_path / "in/b.zip").symlink_to(tmp_path / "nowhere")
    assert warned(corpus, tmp_path / "out") == []
