"""Outputs seen from outside: what was written, in order, whether or not it is still there."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest

from cluster.demo.local_s3 import LocalS3
from tests.chaos.places import LocalPlace, S3Place
from tests.chaos.proxy import FaultProxy


def test_a_folder_s_history_has_what_came_changed_and_went(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "run")
    place.put_corpus({"a.parquet": b"corpus"})
    assert (Path(place.input) / "a.parquet").read_bytes() == b"corpus"
    assert place.writes() == []
    labels = Path(place.output)
    (labels / "_run").mkdir(parents=True)
    (labels / "_run" / "summary.json").write_bytes(b"{}")
    (labels / ".a.tmp").write_bytes(b"part")
    (labels / "a.parquet").write_bytes(b"one")
    place.writes()
    (labels / "a.parquet").unlink()
    (labels / "b.parquet").write_bytes(b"two")
    writes = [(w.key, w.body) for w in place.writes() if not w.key.startswith("_")]
    assert writes == [("a.parquet", b"one"), ("b.parquet", b"two"), ("a.parquet", None)]
    assert place.commits() == 2
    assert place.objects().keys() == {".a.tmp", "b.parquet", "_run/summary.json"}
    place.close()
    assert not (tmp_path / "run").exists()


def test_a_small_disk_is_full_until_it_is_freed(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "run", small_disk=True)
    try:
        if not place.disk_is_small:
            pytest.skip("this process may not mount a file system")
        file = Path(place.output).parent / "file"
        place.fill()
        with pytest.raises(OSError, match="No space left"):
            file.write_bytes(b"one")
        place.free()
        file.write_bytes(b"one")
    finally:
        place.close()


def test_a_bucket_s_history_has_what_the_server_carried_out(s3_server: LocalS3) -> None:
    with FaultProxy(s3_server.endpoint) as proxy:
        place = S3Place("places-1", s3_server.endpoint, proxy)
        place.put_corpus({"a.parquet": b"corpus"})
        client = boto3.session.Session().client("s3", endpoint_url=proxy.endpoint)
        target = {"Bucket": "places-1", "Key": "labels/é.parquet", "IfNoneMatch": "*"}
        client.put_object(Body=b"one", **target)
        with pytest.raises(client.exceptions.ClientError):
            client.put_object(Body=b"two", **target)  # refused: no part of the history
        client.delete_object(Bucket="places-1", Key="labels/é.parquet")
        assert [(w.key, w.body) for w in place.writes()] == [
            ("é.parquet", b"one"),
            ("é.parquet", None),
        ]
        assert place.commits() == 1
        assert place.objects() == {}
        client.close()
        place.close()
