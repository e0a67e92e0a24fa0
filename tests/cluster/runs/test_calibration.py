"""A run that may choose prunes only where its own rows say that it pays, and stays with that."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.speedup import MeasuredRatio
from cluster.console import open_console
from cluster.errors import UsageError
from cluster.output.summary import summarise
from cluster.protocol import LabelRequest, Priority
from cluster.report.terminal import render
from cluster.runs.calibration import calibrate
from jobs.make_corpus import make_corpus
from sppruner.engine.interface import Result
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.cluster.corpora import Planned, config, plan

SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.25))


class TimedReplicas:
    """Replicas whose dense answers to a batch of that number take `dense(number)` seconds a row,
    and pruned ones a second. Of each batch in `deaths` a replica dies first."""

    def __init__(self, dense: Callable[[int], float], deaths: Sequence[int] = ()) -> None:
        self.batches: list[list[LabelRequest]] = []
        self._dense = dense
        self._deaths = set(deaths)

    def stream(self, call: LabelRequest) -> AsyncGenerator[str | Result]:
        raise AssertionError("nothing streams here")

    async def label(self, calls: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        assert priority is Priority.BATCH
        number = len(self.batches)
        if number in self._deaths:
            self._deaths.remove(number)
            raise RayActorError
        self.batches.append(list(calls))
        pruned, dense = 1 + number / 1e6, self._dense(number)
        return [Result(id=c.id, text="", seconds=pruned, control_seconds=dense) for c in calls]


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    make_corpus(kind="caption", rows=60, output=f"{tmp_path}/in", faults=True)
    return plan(f"{tmp_path}/in", f"{tmp_path}/out", spec=SPEC, unit_rows=20, auto=True)


def chosen(
    planned: Planned, replicas: TimedReplicas, rows: int = 4, units: int | None = None
) -> BreakEven:
    manifest, output = planned
    settings = config(manifest.source, output.uri, spec=SPEC, auto=True)
    return calibrate(settings, manifest, manifest.units[:units], output, replicas, slots=rows)


def test_pruning_is_chosen_where_dense_rows_were_slower_in_all_full_batches(
    planned: Planned,
) -> None:
    replicas = TimedReplicas(lambda _: 2.0)
    found = chosen(planned, replicas)
    assert found.pays
    assert found.spec(SPEC) == SPEC
    assert found.measured is not None
    assert found.measured.ratio == pytest.approx(2, rel=1e-4)
    assert [len(batch) for batch in replicas.batches] == [4] * 7
    asked = [call for batch in replicas.batches for call in batch]
    assert all(call.control and call.spec == SPEC for call in asked)
    assert len({call.id for call in asked}) == len(asked)


@pytest.mark.parametrize(
    "dense",
    [lambda _: 0.9, lambda _: 1.0, lambda n: 0.5 if n % 2 else 2.0],
    ids="slower equal unsure".split(),
)
def test_a_run_is_dense_unless_pruning_surely_pays(
    planned: Planned, dense: Callable[[int], float]
) -> None:
    found = chosen(planned, TimedReplicas(dense))
    assert found.spec(SPEC) == DENSE


def test_the_first_batch_is_not_counted(planned: Planned) -> None:
    found = chosen(planned, TimedReplicas(lambda number: 2.0 if number else 0.01))
    assert found.pays


def test_a_replica_that_dies_meanwhile_costs_no_choice(planned: Planned) -> None:
    replicas = TimedReplicas(lambda _: 2.0, deaths=[0, 3])
    found = chosen(planned, replicas)
    assert found.pays
    assert [len(batch) for batch in replicas.batches] == [4] * 7


def test_too_few_rows_for_two_full_batches_are_not_known_to_pay(planned: Planned) -> None:
    found = chosen(planned, TimedReplicas(lambda _: 2.0), rows=16, units=1)
    assert not found.pays


def test_of_few_rows_only_small_batches_are_measured(planned: Planned) -> None:
    replicas = TimedReplicas(lambda _: 2.0)
    chosen(planned, replicas, rows=64)
    assert {len(batch) for batch in replicas.batches} == {16}


def test_a_run_that_may_choose_must_have_something_to_choose(planned: Planned) -> None:
    with pytest.raises(UsageError, match="--auto"):
        config(planned.manifest.source, planned.output.uri, spec=DENSE, auto=True)


def test_a_resumed_run_holds_to_the_choice_and_measures_nothing(planned: Planned) -> None:
    first = chosen(planned, TimedReplicas(lambda _: 2.0))
    again = TimedReplicas(lambda _: 0.1)
    second = chosen(planned, again)
    assert second == first == planned.output.break_even()
    assert not again.batches


def test_the_report_says_what_was_measured_and_what_ran(planned: Planned) -> None:
    def said() -> str:
        wide = open_console()
        with wide.capture() as captured:
            wide.print(render(summarise(planned.output.uri)))
        return captured.get()

    assert "break-even" not in said()
    found = chosen(planned, TimedReplicas(lambda _: 0.5))
    assert "dense / pruned was 0.50 ×" in said()
    assert "every row ran dense" in said()
    assert summarise(planned.output.uri).to_dict()["break_even"] == found.to_dict()
    assert isinstance(found.measured, MeasuredRatio)
    assert Path(planned.output.uri, "_run", "break-even.json").is_file()
