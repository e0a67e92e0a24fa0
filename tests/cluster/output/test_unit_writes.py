"""Where units are written: here, or on another node where the output is not mounted here."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.corpus.packed import pack_unit
from cluster.events import RunEvent
from cluster.other_node import another_node
from cluster.output import unit_writes
from cluster.output.run_output import RunOutput
from cluster.output.unit_writes import write_units
from tests.cluster.labelled_tables import row, table


def count_rows(journal: Path, unit: pa.Table) -> int:
    with journal.open("a") as file:
        file.write(f"{len(unit)}\n")
    return len(unit)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("others", [True, False])
def test_each_unit_is_written_once_here_or_where_the_output_is_seen(
    here: bool, others: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = RunOutput.open(tmp_path)
    monkeypatch.setattr(output, "is_here", lambda: here)
    placed: list[str] = []

    def placement() -> str | None:
        placed.append("asked")
        return "DEFAULT" if others else None

    monkeypatch.setattr(unit_writes, "another_node", placement)
    events: list[tuple[RunEvent, int]] = []
    journal = tmp_path / "journal"
    write = partial(count_rows, journal)
    blocks = [pack_unit(table(row(0), row(1))), pack_unit(table(row(0), row(1), row(2)))]

    def told(kind: RunEvent, count: int) -> None:
        events.append((kind, count))

    assert write_units(blocks, write, output, told) == [2, 3]
    assert journal.read_text().split() == ["2", "3"]
    moved = not here and others
    assert bool(placed) == (not here)
    assert events == ([(RunEvent.UNIT_MOVED, 2)] if moved else [])


@pytest.mark.usefixtures("local_ray")
def test_a_cluster_of_one_node_has_no_other() -> None:
    assert another_node() is None
