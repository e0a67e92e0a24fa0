"""Indexing many tars: no index is lost, and what other tools counted is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cluster.corpus import tar
from cluster.corpus.index_object import decode_index, encode_index, name_index
from cluster.corpus.shard_counts import find_shard_counts
from cluster.corpus.tar_index import index_tar
from cluster.errors import StoreError, UsageError
from cluster.runs import indexing
from cluster.store import ObjectInfo, Store, open_store
from cluster.store.local import LocalStore
from tests.cluster.corpora import plan, tar_bytes


@pytest.fixture
def corpus(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "in"))
    for number in range(12):
        members = [(f"{number}-{n}.jpg", b"x") for n in range(3)]
        store.put(f"{number:05}.tar", tar_bytes(members))
    return store


def test_an_index_survives_its_bytes(corpus: Store) -> None:
    whole = tar_bytes([("a.jpg", b"x"), ("b.jpg", b"x"), ("NOTE", b"x")])
    corpus.put("damaged.tar", whole[:512] + whole[1024:])
    info = corpus.list("damaged")[0]
    index = index_tar(corpus, info, unit_rows=4, unit_bytes=1_000)
    assert index.unread_bytes
    assert index.warnings
    assert decode_index(encode_index(index), info) == index
    other = ObjectInfo(key=info.key, size=info.size, etag="other")
    assert decode_index(encode_index(index), other) is None
    assert decode_index(b'{"object"', info) is None


def test_a_planner_that_died_has_lost_no_index(
    corpus: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path / "out")
    indexed: list[str] = []
    broken = {"00007.tar"}

    def index(store: Store, info: ObjectInfo, **bounds: Any) -> Any:
        if info.key in broken:
            raise StoreError("away")
        indexed.append(info.key)
        return index_tar(store, info, **bounds)

    monkeypatch.setattr(indexing, "index_tar", index)
    with pytest.raises(StoreError):
        plan(corpus.uri, output)
    before = set(indexed)
    assert before == {f"{number:05}.tar" for number in range(12)} - broken

    indexed.clear()
    broken.clear()
    planned = plan(corpus.uri, output)
    assert indexed == ["00007.tar"]
    fresh = plan(corpus.uri, str(tmp_path / "fresh"))
    assert planned.manifest.units == fresh.manifest.units
    assert planned.manifest.rows == 36


def test_an_index_of_other_settings_or_another_version_is_not_used(corpus: Store) -> None:
    info = corpus.list()[0]
    bounds: dict[str, Any] = {"unit_rows": 4, "unit_bytes": 9, "dotted_keys": False}
    changed = [
        name_index("s", info, **bounds),
        name_index("t", info, **bounds),
        name_index("s", ObjectInfo(key=info.key, size=info.size, etag="x"), **bounds),
        *(name_index("s", info, **{**bounds, name: 7}) for name in ("unit_rows", "unit_bytes")),
        name_index("s", info, **{**bounds, "dotted_keys": True}),
    ]
    assert len(set(changed)) == len(changed)


def test_what_other_tools_counted_is_compared_with_what_was_found(
    corpus: Store, tmp_path: Path
) -> None:
    corpus.put("00000_stats.json", b'{"count": 9, "successes": 3}')
    corpus.put("00001_stats.json", b'{"successes": 5}')
    corpus.put("00002_stats.json", b"broken")
    shards = [{"url": "00003.tar", "nsamples": 4}, {"url": "s3://b/00004.tar", "nsamples": 3}]
    corpus.put("index.json", json.dumps({"wids_version": 1, "shardlist": shards}).encode())
    with capture_logs() as events:
        plan(corpus.uri, str(tmp_path / "out"))
    differ = [event for event in events if event["event"] == "archive_rows_differ"]
    found = [(event["uri"][-9:], event["rows"], event["rows_expected"]) for event in differ]
    assert found == [("00001.tar", 3, 5), ("00003.tar", 3, 4)]


def test_json_files_of_samples_are_not_taken_for_an_index(corpus: Store) -> None:
    for number in range(20):
        corpus.put(f"{number}.json", b'{"shardlist": [{"url": "00000.tar", "nsamples": 1}]}')
    corpus.put("list.json", b"[1, 2]")
    assert find_shard_counts(corpus, corpus.list(suffixes=(".tar",))) == {}


def test_a_tar_without_a_single_key_and_extension_is_named(corpus: Store, tmp_path: Path) -> None:
    """Its rows would be missing beside those of the others."""
    corpus.put("odd.tar", tar_bytes([("000001", b"x"), ("000002", b"x")]))
    with pytest.raises(UsageError, match=r"odd\.tar: no member is named KEY\.EXTENSION .*000001"):
        plan(corpus.uri, str(tmp_path / "out"))
    corpus.put("odd.tar", tar_bytes([(".DS_Store", b"x")]))
    assert plan(corpus.uri, str(tmp_path / "out")).manifest.rows == 36


def test_a_tar_with_too_many_members_is_named(
    corpus: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "MAX_MEMBERS", 5)
    assert plan(corpus.uri, str(tmp_path / "out")).manifest.rows == 36
    corpus.put("00007.tar", tar_bytes([(f"{n}.jpg", b"x") for n in range(6)]))
    with pytest.raises(UsageError, match=r"00007\.tar: more than 5 members .*split it"):
        plan(corpus.uri, str(tmp_path / "other"))


@pytest.mark.parametrize("name", ["b.PARQUET", "folder/b.TAR"])
def test_a_file_that_is_known_by_another_name_elsewhere_is_named(
    corpus: Store, tmp_path: Path, name: str
) -> None:
    corpus.put(name, b"x")
    with pytest.raises(UsageError, match=f"{name}: .* in lower case; rename it"):
        plan(corpus.uri, str(tmp_path / "out"))


def test_the_folder_of_a_single_tar_is_not_looked_through(
    corpus: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no input: it may be /tmp, or a bucket of millions."""
    real, asked = LocalStore.list, []

    def listing(store: LocalStore, prefix: str = "", suffixes: Any = ()) -> list[ObjectInfo]:
        if ".json" in suffixes:
            asked.append(prefix)
            raise StoreError("no")
        return real(store, prefix, suffixes)

    monkeypatch.setattr(LocalStore, "list", listing)
    assert plan(f"{corpus.uri}/00003.tar", str(tmp_path / "out")).manifest.rows == 3
    assert asked == ["00003"]
