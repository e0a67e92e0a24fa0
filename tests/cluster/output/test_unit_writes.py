"""Where units are written: here, or on another node where the output is not mounted here."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import cast

import pyarrow as pa
import pytest
import ray
from ray.exceptions import WorkerCrashedError

from cluster.corpus.packed import pack_unit
from cluster.errors import CommitRefused, StoreError
from cluster.events import RunEvent, ignore_event
from cluster.other_node import other_nodes
from cluster.output import unit_writes
from cluster.output.run_output import RunOutput
from cluster.output.unit_writes import _write_if_here, write_units
from cluster.store import open_store
from tests.cluster.corpora import plan, put_parquet
from tests.cluster.labelled_tables import row, table


def count_rows(journal: Path, unit: pa.Table) -> int:
    with journal.open("a") as file:
        file.write(f"{len(unit)}\n")
    return len(unit)


class Output:
    """Seen from everywhere, or not from the processes of these ids."""

    uri = "/mnt/labels"

    def __init__(self, *blind: int) -> None:
        self.blind = blind

    def is_here(self) -> bool:
        return os.getpid() not in self.blind

    def check_run(self) -> None:
        pass


BLOCKS = [pack_unit(table(row(0), row(1))), pack_unit(table(row(0), row(1), row(2)))]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("others", [0, 2])
def test_each_unit_is_written_once_here_or_where_the_output_is_seen(
    here: bool, others: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_writes, "other_nodes", lambda: ["DEFAULT"] * others)
    output = cast(RunOutput, Output() if here else Output(os.getpid()))
    events: list[tuple[RunEvent, int]] = []
    journal = tmp_path / "journal"

    def told(kind: RunEvent, count: int) -> None:
        events.append((kind, count))

    assert write_units(BLOCKS, partial(count_rows, journal), output, told) == [2, 3]
    assert journal.read_text().split() == ["2", "3"]
    assert events == ([(RunEvent.UNIT_MOVED, 2)] if others and not here else [])


def refuse(unit: pa.Table) -> None:
    raise CommitRefused("rows are missing")


@pytest.mark.usefixtures("local_ray")
def test_an_error_on_another_node_is_the_same_error_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_writes, "other_nodes", lambda: ["DEFAULT"])
    with pytest.raises(CommitRefused, match="rows are missing"):
        write_units(BLOCKS, refuse, cast(RunOutput, Output(os.getpid())), ignore_event)


def test_a_node_writes_what_it_sees_and_hands_back_errors_as_values(tmp_path: Path) -> None:
    tables = [table(row(0), row(1))]
    seen, unseen = cast(RunOutput, Output()), cast(RunOutput, Output(os.getpid()))
    write = partial(count_rows, tmp_path / "journal")
    assert _write_if_here(tables, write, unseen, ignore_event) is None
    assert not (tmp_path / "journal").exists()
    assert _write_if_here(tables, write, seen, ignore_event) == [2]
    assert isinstance(_write_if_here(tables, refuse, seen, ignore_event), CommitRefused)


@pytest.mark.parametrize("answer", [None, WorkerCrashedError()])
@pytest.mark.usefixtures("local_ray")
def test_nodes_that_cannot_help_are_passed_over(
    answer: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def get(task: object) -> None:
        asked.append(task)
        if answer is not None:
            raise answer

    monkeypatch.setattr(unit_writes, "other_nodes", lambda: ["DEFAULT"] * 2)
    monkeypatch.setattr("ray.get", get)
    output = cast(RunOutput, Output(os.getpid()))
    write = partial(count_rows, tmp_path / "journal")
    assert write_units(BLOCKS, write, output, ignore_event) == [2, 3]
    assert len(asked) == 2


@pytest.mark.usefixtures("local_ray")
def test_the_other_nodes_are_those_that_live(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not other_nodes(), "this cluster has one node"
    here = ray.get_runtime_context().get_node_id()
    nodes = {here: True, "b" * 56: True, "c" * 56: False, "d" * 56: True}
    listed = [{"NodeID": node, "Alive": alive} for node, alive in nodes.items()]
    monkeypatch.setattr("ray.nodes", lambda: listed)
    assert {node.node_id for node in other_nodes()} == {"b" * 56, "d" * 56}


def test_nothing_is_written_to_an_output_that_is_another_runs_by_now(tmp_path: Path) -> None:
    """Somebody emptied the folder and began another run there while this one's driver slept."""
    put_parquet(open_store(f"{tmp_path}/in"), "a.parquet", pa.table({"image": [b"0"]}))
    planned = plan(f"{tmp_path}/in", f"{tmp_path}/out")
    output, run_id = planned.output, planned.manifest.run_id
    write = partial(count_rows, tmp_path / "journal")
    assert write_units(BLOCKS, write, output, ignore_event) == [2, 3]

    manifest = tmp_path / "out/_run/manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(run_id.encode(), b"0" * 16))
    assert not output.is_here(), "below a mount that is missing there may be an older run's folder"
    with pytest.raises(StoreError, match=f"not the output of run {run_id} any more"):
        write_units(BLOCKS, write, output, ignore_event)
    manifest.unlink()
    with pytest.raises(StoreError, match="removed or replaced"):
        write_units(BLOCKS, write, output, ignore_event)
    assert (tmp_path / "journal").read_text().split() == ["2", "3"]
