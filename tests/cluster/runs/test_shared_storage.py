"""A driver whose node sees another folder than the others stops before anything is labelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from rich.console import Console

from cluster.errors import StoreError, UsageError
from cluster.output.run_output import RunOutput
from cluster.runs import shared_storage
from cluster.runs.shared_storage import check_corpus, check_shared
from cluster.store import open_store
from tests.cluster.corpora import plan, put_parquet

OURS, OTHER = b'{"run_id": "a", "created": "1"', b'{"run_id": "a", "created": "2"'


class Output:
    def __init__(self, uri: str) -> None:
        self.uri = uri

    def manifest_head(self) -> bytes:
        return OURS


def check(seen: list[bytes | None], monkeypatch: pytest.MonkeyPatch, uri: str = "/mnt/out") -> str:
    """What is printed."""
    monkeypatch.setattr(shared_storage, "_seen_elsewhere", lambda _: seen)
    console = Console(width=300)
    with console.capture() as captured:
        check_shared(Output(uri), console)  # type: ignore[arg-type]
    return captured.get()


@pytest.mark.parametrize("seen", [[], [OURS], [OURS, None], [None, OURS, OURS]])
def test_an_output_that_another_node_sees_is_shared(
    seen: list[bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(seen, monkeypatch) == ""


@pytest.mark.parametrize("seen", [[OTHER], [OURS, OTHER], [None, OTHER, None]])
def test_a_run_that_others_see_in_its_place_is_a_usage_error(
    seen: list[bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=f"/mnt/out .* on 1 of {len(seen)} other nodes"):
        check(seen, monkeypatch)


def test_a_node_whose_store_does_not_answer_has_seen_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One failed request there is no other run there, nor here."""

    class Silent:
        uri = "s3://bucket/out"

        def manifest_head(self, **patience: float) -> bytes:
            raise StoreError("no answer")

    assert shared_storage._look(Silent()) is None  # type: ignore[arg-type]
    monkeypatch.setattr(shared_storage, "_seen_elsewhere", lambda _: [OURS])
    with pytest.raises(StoreError, match="no answer"):
        check_shared(Silent(), Console(quiet=True))  # type: ignore[arg-type]


def test_an_output_that_no_other_node_sees_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not mounted here, or not there" in check([None, None], monkeypatch)
    assert "AWS_*" in check([None], monkeypatch, "s3://bucket/out")


def test_the_other_nodes_are_asked(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "out/_run/manifest.json"
    output = RunOutput.open(tmp_path / "out")
    assert output.manifest_head() is None
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(OURS)
    assert shared_storage._seen_elsewhere(output) == [], "this cluster has one node"
    monkeypatch.setattr(shared_storage, "other_nodes", lambda: ["DEFAULT", "SPREAD"])
    assert shared_storage._seen_elsewhere(output) == [OURS, OURS]
    assert ray.is_initialized()


@pytest.mark.parametrize(
    ("change", "harm"),
    [
        (lambda folder: None, False),
        (lambda folder: (folder / "b.parquet").write_bytes(b"other"), True),
        (lambda folder: (folder / "b.parquet").unlink(), True),
    ],
)
def test_a_copy_of_the_corpus_that_differs_on_another_node_is_a_usage_error(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, harm: bool
) -> None:
    store = open_store(tmp_path / "in")
    for name in ("a", "b"):
        put_parquet(store, f"{name}.parquet", pa.table({"image": [b"0"]}))
    planned = plan(store.uri, f"{tmp_path}/out")
    check_corpus(planned.manifest)  # this cluster has one node
    change(tmp_path / "in")
    monkeypatch.setattr(shared_storage, "other_nodes", lambda: ["DEFAULT", "SPREAD"])
    if harm:
        with pytest.raises(UsageError, match="another folder on 2 of 2 other nodes"):
            check_corpus(planned.manifest)
    else:
        check_corpus(planned.manifest)


def test_a_node_without_the_corpus_is_no_copy_that_differs(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_parquet(open_store(tmp_path / "in"), "a.parquet", pa.table({"image": [b"0"]}))
    planned = plan(f"{tmp_path}/in", f"{tmp_path}/out")
    monkeypatch.setattr(shared_storage, "other_nodes", lambda: ["DEFAULT"])
    monkeypatch.setattr(shared_storage, "_ask_others", lambda *_: [None])
    check_corpus(planned.manifest)
