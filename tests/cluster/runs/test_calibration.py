"""Calibration of a run with --auto: the rule, retries, and the decision kept on resume."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.speedup import MeasuredRatio
from cluster.console import open_console
from cluster.errors import UsageError
from cluster.output.summary import summarise
from cluster.protocol import BlockAnswers, LabelRequest, Priority
from cluster.report.terminal import render
from cluster.runs.calibration import calibrate
from jobs.make_corpus import make_corpus
from sppruner.engine.interface import Result
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.cluster.corpora import Planned, config, plan
from tests.cluster.measured_blocks import even_block

SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.25))


class TimedReplicas:
    """Replicas that take one second for a pruned row and `dense(number)` seconds for a dense row of
    block `number`. The first attempt at each block in `deaths` ends in the death of a replica;
    blocks in `spoiled` are."""

    def __init__(
        self,
        dense: Callable[[int], float],
        deaths: Sequence[int] = (),
        spoiled: Collection[int] = (),
    ) -> None:
        self.blocks: list[list[LabelRequest]] = []
        self.dense_first: list[bool] = []
        self._dense = dense
        self._deaths = set(deaths)
        self._spoiled = spoiled

    def label_alone(self, requests: Sequence[LabelRequest]) -> AsyncGenerator[list[Result] | None]:
        raise AssertionError("nothing is quarantined here")

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        assert self._deaths is not None, "only what a dead replica left is labelled so"
        return [Result(id=c.id, text="", seconds=1.0) for c in requests]

    async def label_block(
        self, requests: Sequence[LabelRequest], *, dense_first: bool
    ) -> BlockAnswers:
        number = len(self.blocks)
        self.blocks.append(list(requests))
        self.dense_first.append(dense_first)
        if number in self._deaths:
            raise RayActorError
        pruned, dense = (
            [Result(id=c.id, text="", seconds=seconds) for c in requests]
            for seconds in (1 + number / 1e6, self._dense(number))
        )
        return even_block(pruned, None if number in self._spoiled else dense)


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    make_corpus(kind="caption", rows=300, output=f"{tmp_path}/in", faults=True)
    return plan(f"{tmp_path}/in", f"{tmp_path}/out", spec=SPEC, unit_rows=20, auto=True)


def run_calibration(
    planned: Planned, replicas: TimedReplicas, rows: int = 4, units: int | None = None
) -> BreakEven:
    manifest, output = planned
    settings = config(manifest.source, output.uri, spec=SPEC, auto=True)
    return calibrate(settings, manifest, manifest.units[:units], output, replicas, slots=rows)


def test_pruning_is_chosen_if_dense_rows_are_slower_in_all_blocks(
    planned: Planned,
) -> None:
    replicas = TimedReplicas(lambda _: 2.0)
    decision = run_calibration(planned, replicas)
    assert decision.pays
    assert decision.spec(SPEC) == SPEC
    assert decision.measured is not None
    assert decision.measured.ratio == pytest.approx(2, rel=1e-4)
    assert [len(block) for block in replicas.blocks] == [16] * 6
    requests = [request for block in replicas.blocks for request in block]
    assert all(request.spec == SPEC for request in requests)
    assert len({request.id for request in requests}) == len(requests)
    assert sorted(replicas.dense_first) == [False] * 3 + [True] * 3
    units = [block[0].id.split(":")[1] for block in replicas.blocks]
    planned_units = [unit.unit_id for unit in planned.manifest.units]
    assert len(set(units)) == 6
    assert max(map(planned_units.index, units)) >= 6, "of all units, not of the first ones"


@pytest.mark.parametrize(
    "dense",
    [lambda _: 0.9, lambda _: 1.0, lambda n: 0.5 if n % 2 else 2.0],
    ids="slower equal uncertain".split(),
)
def test_a_run_is_dense_unless_pruning_pays_with_certainty(
    planned: Planned, dense: Callable[[int], float]
) -> None:
    decision = run_calibration(planned, TimedReplicas(dense))
    assert decision.spec(SPEC) == DENSE


@pytest.mark.parametrize("lost", ["deaths", "spoiled"])
def test_blocks_that_are_not_measured_are_replaced(planned: Planned, lost: str) -> None:
    replicas = TimedReplicas(lambda _: 2.0, **{lost: [0, 3]})
    decision = run_calibration(planned, replicas)
    assert decision.measured is not None
    assert decision.measured.blocks == 6
    assert len(replicas.blocks) == 8
    assert decision.pays


def test_too_few_units_for_an_interval_give_a_dense_run(planned: Planned) -> None:
    """Without measuring: whatever it gave, it could not show that pruning pays."""
    replicas = TimedReplicas(lambda _: 2.0)
    decision = run_calibration(planned, replicas, units=4)
    assert (decision.measured, decision.pays, decision.seconds) == (None, False, 0.0)
    assert not replicas.blocks


def test_what_measuring_took_is_kept(planned: Planned) -> None:
    """Six blocks of sixteen rows, a second each pruned and two densely."""
    decision = run_calibration(planned, TimedReplicas(lambda _: 2.0))
    assert decision.seconds == pytest.approx(6 * 16 * 3.0, rel=1e-4)


def test_auto_without_a_pruning_method_is_a_usage_error(planned: Planned) -> None:
    with pytest.raises(UsageError, match="--auto"):
        config(planned.manifest.source, planned.output.uri, spec=DENSE, auto=True)


def test_a_resumed_run_keeps_the_decision_and_measures_nothing(planned: Planned) -> None:
    first = run_calibration(planned, TimedReplicas(lambda _: 2.0))
    unused = TimedReplicas(lambda _: 0.1)
    second = run_calibration(planned, unused)
    assert second == first == planned.output.break_even()
    assert not unused.blocks


def test_the_report_shows_the_measured_ratio_and_the_decision(planned: Planned) -> None:
    def report() -> str:
        console = open_console()
        with console.capture() as captured:
            console.print(render(summarise(planned.output.uri)))
        return captured.get()

    assert "break-even" not in report()
    decision = run_calibration(planned, TimedReplicas(lambda _: 0.5))
    assert "dense / pruned was 0.50 ×" in report()
    assert "every row ran dense" in report()
    assert summarise(planned.output.uri).to_dict()["break_even"] == decision.to_dict()
    assert isinstance(decision.measured, MeasuredRatio)
    assert Path(planned.output.uri, "_run", "break-even.json").is_file()
