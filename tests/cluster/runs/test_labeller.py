"""The labelling stage: calls, control blocks, error rows, replica deaths, and the output table."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from cluster.accounting.control_plan import ControlPlan
from cluster.accounting.ledger import UnitLedger
from cluster.config import Kind, RunConfig
from cluster.controller import RunName, get_controller, report_commit
from cluster.corpus.image_values import image_array
from cluster.corpus.packed import pack_unit, unpack_units
from cluster.errors import ErrorShareExceeded, FleetUnavailable
from cluster.protocol import BlockAnswers, LabelRequest, Priority
from cluster.runs.labeller import Labeller, LabellerSettings, actors_for, label_units
from cluster.runs.replica_wait import PATIENCE_SECONDS
from cluster.schema import input_schema, output_schema
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import Fleet, open_fleet
from cluster.serving.replica import VLMReplica
from sppruner.engine.interface import Result
from sppruner.spec import Budget, PruneSpec
from tests.cluster.fake_engine import VISUAL_TOKENS, expected_text, picture
from tests.cluster.runs.virtual_time import run_in_virtual_time

ENGINE = "tests.cluster.fake_engine:FakeEngine"
SOURCE = pa.schema([pa.field("source_text", pa.string())])
HALF = PruneSpec(method="m", budget=Budget(ratio=0.5))


def config(kind: Kind = "caption", **more: object) -> RunConfig:
    values = {"spec": HALF, "prompt": "describe", **more}
    return RunConfig(kind=kind, input="in", output="out", model="fake", **values)  # type: ignore[arg-type]


def labeller_settings(run: RunConfig, run_id: str = "run", **more: object) -> LabellerSettings:
    values = {"app": "", "deployment": "", "slots": 4, **more}
    name = RunName(run_id, run.output)
    return LabellerSettings(name=name, config=run, model_revision="fake-1", **values)  # type: ignore[arg-type]


def unit(
    name: str,
    rows: int,
    *,
    prompts: Callable[[int], str | None] = lambda n: None,
    errors: frozenset[int] = frozenset(),
) -> pa.Table:
    numbers = range(rows)
    columns = {
        "source_text": [f"old {n}" for n in numbers],
        "_in_unit": [name] * rows,
        "_in_unit_rows": [rows] * rows,
        "_in_row": list(numbers),
        "_in_key": [f"{name}/{n}" for n in numbers],
        "_in_image": image_array([picture(n) for n in numbers]),
        "_in_prompt": [prompts(n) for n in numbers],
        "_in_error_code": ["read_failed" if n in errors else None for n in numbers],
        "_in_error_message": ["broken" if n in errors else None for n in numbers],
        "_in_error_stage": ["read" if n in errors else None for n in numbers],
    }
    return pa.table(columns, schema=input_schema(SOURCE))


class RecordingReplica:
    """A replica in this process that records its calls."""

    def __init__(self, slots: int | None = None) -> None:
        self.calls: list[Sequence[LabelRequest]] = []
        self.blocks: list[Sequence[LabelRequest]] = []
        settings = EngineSettings(model="fake", engine=ENGINE, slots=slots)
        self._replica = VLMReplica(settings)

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        self.calls.append(requests)
        return await self._replica.label(requests, priority=priority)

    def label_alone(self, requests: Sequence[LabelRequest]) -> AsyncGenerator[list[Result] | None]:
        raise AssertionError("nothing is quarantined here")

    async def label_block(
        self, requests: Sequence[LabelRequest], *, dense_first: bool
    ) -> BlockAnswers:
        self.blocks.append(requests)
        return await self._replica.label_block(requests, dense_first=dense_first)


def label(
    run: RunConfig, *tables: pa.Table, run_id: str = "run"
) -> tuple[pa.Table, RecordingReplica]:
    async def body() -> tuple[pa.Table, RecordingReplica]:
        replicas = RecordingReplica()
        labeller = Labeller(labeller_settings(run, run_id), replicas)
        block = pa.concat_tables([pack_unit(table) for table in tables])
        return pa.concat_tables(unpack_units(await labeller(block))), replicas

    return asyncio.run(asyncio.wait_for(body(), 30))


def test_every_row_is_labelled_once_in_order_with_source_columns_and_pruning_claims() -> None:
    table, _ = label(config(), unit("u", 11))

    assert table["source_text"].to_pylist() == [f"old {n}" for n in range(11)]
    assert table["text"].to_pylist() == [
        expected_text(picture(n), VISUAL_TOKENS // 2) for n in range(11)
    ]
    assert table["key"].to_pylist() == [f"u/{n}" for n in range(11)]
    assert table["unit_row"].to_pylist() == list(range(11))
    row = table.slice(0, 1).to_pylist()[0]
    assert (row["prune_method"], row["prune_spec"]) == ("m", HALF.to_json())
    assert (row["visual_tokens"], row["visual_tokens_kept"]) == (100, 50)
    mask = np.frombuffer(row["kept_tokens"], np.uint8)
    kept = np.unpackbits(mask, count=100, bitorder="little")
    assert kept.tolist() == [1] * 50 + [0] * 50
    assert (row["model"], row["model_revision"], row["run_id"]) == ("fake", "fake-1", "run")
    assert (row["attempts"], row["is_control"], row["control_text"]) == (1, False, None)


@pytest.mark.parametrize("kind", ["caption", "vqa"])
def test_the_labelled_table_has_exactly_the_committed_columns_and_two_internal_ones(
    kind: Kind,
) -> None:
    table, _ = label(config(kind), unit("u", 3, prompts=lambda n: "what?"))
    committed = output_schema(SOURCE, kind)
    assert table.schema.names == [*committed.names, "_in_unit", "_in_unit_rows"]
    assert table.select(committed.names).schema == committed


def test_units_of_one_block_never_share_a_call() -> None:
    table, replicas = label(config(), unit("a", 5), unit("b", 6))
    assert table["unit_id"].to_pylist() == ["a"] * 5 + ["b"] * 6
    for call in replicas.calls:
        assert len({request.id.split(":")[0] for request in call}) == 1


def test_a_table_without_rows_keeps_the_schema() -> None:
    empty, _ = label(config(), unit("u", 0))
    full, _ = label(config(), unit("u", 2))
    assert empty.schema == full.schema
    assert empty.num_rows == 0


def plan(*units: str, asked: int = 1, rows: int = 40, slots: int = 4) -> ControlPlan:
    return ControlPlan.of("run", [(name, rows) for name in units], slots=slots, asked=asked)


def label_measured(
    allowed: bool, control: ControlPlan, *tables: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> tuple[pa.Table, RecordingReplica, list[str]]:
    """The labelled table, the replica, and the units for which the controller was asked."""
    asked: list[str] = []

    async def may_measure(name: RunName, unit: str) -> bool:
        asked.append(unit)
        return allowed

    monkeypatch.setattr("cluster.runs.labeller.may_measure", may_measure)

    async def body() -> tuple[pa.Table, RecordingReplica]:
        replicas = RecordingReplica()
        labeller = Labeller(labeller_settings(config(), control=control), replicas)
        block = pa.concat_tables([pack_unit(table) for table in tables])
        return pa.concat_tables(unpack_units(await labeller(block))), replicas

    return *asyncio.run(asyncio.wait_for(body(), 30)), asked


def test_a_control_block_is_answered_both_ways_and_its_rows_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, replicas, asked = label_measured(
        True, plan("u"), unit("u", 40), unit("v", 40), monkeypatch=monkeypatch
    )
    assert asked == ["u"], "only of units that may have one"
    (block,) = replicas.blocks
    numbers = [int(request.id.removeprefix("u:")) for request in block]
    assert numbers == list(range(numbers[0], numbers[0] + 16)), "contiguous, four for each slot"
    rows = table.to_pylist()
    assert [(r["unit_id"], r["unit_row"]) for r in rows if r["is_control"]] == [
        ("u", n) for n in numbers
    ]
    row = rows[numbers[0]]
    assert row["control_text"] == expected_text(picture(numbers[0]), VISUAL_TOKENS)
    assert row["text"] == expected_text(picture(numbers[0]), VISUAL_TOKENS // 2)
    assert row["control_seconds"] > 0
    for name in ("steady_seconds", "control_steady_seconds"):
        steady = [r["unit_row"] for r in rows if r[name] is not None]
        assert steady
        assert set(steady) <= set(numbers), "of the block alone"
    assert row["device"]
    assert row["discarded_seconds"] > 0, "its share of the replica's warm-up"
    assert {r["text"] is None for r in rows} == {False}
    assert {r["control_text"] for r in rows if not r["is_control"]} == {None}


def test_a_block_that_is_not_allowed_is_labelled_as_any_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, replicas, asked = label_measured(
        False, plan("u"), unit("u", 40), monkeypatch=monkeypatch
    )
    assert asked == ["u"]
    assert not replicas.blocks
    assert not any(table["is_control"].to_pylist())


def test_rows_that_cannot_be_sent_are_in_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable = frozenset(range(0, 40, 3))
    _, replicas, _ = label_measured(
        True, plan("u"), unit("u", 40, errors=unreadable), monkeypatch=monkeypatch
    )
    (block,) = replicas.blocks
    numbers = {int(request.id.removeprefix("u:")) for request in block}
    assert len(numbers) == 16
    assert not numbers & unreadable


def test_a_row_that_could_not_be_read_is_an_error_row_and_is_not_sent() -> None:
    table, replicas = label(config(), unit("u", 4, errors=frozenset({2})))

    row = table.to_pylist()[2]
    assert (row["error_code"], row["error_message"], row["error_stage"]) == (
        "read_failed",
        "broken",
        "read",
    )
    assert (row["attempts"], row["text"], row["seconds"]) == (0, None, None)
    assert "u:2" not in {request.id for call in replicas.calls for request in call}


def test_questions_become_prompts_and_a_missing_question_is_an_error_row() -> None:
    questions = ["how many?", None, "  ", "what colour?"]
    table_in = unit("u", 4, prompts=lambda n: questions[n])
    table, replicas = label(config("vqa", prompt="Q: {question} A:"), table_in)

    assert [request.prompt for call in replicas.calls for request in call] == [
        "Q: how many? A:",
        "Q: what colour? A:",
    ]
    assert table["error_code"].to_pylist() == [None, "prompt_invalid", "prompt_invalid", None]
    assert table["question"].to_pylist() == questions
    assert table["answer"].to_pylist() == table["text"].to_pylist()


def test_a_captions_own_prompt_overrides_the_runs_prompt() -> None:
    _, replicas = label(config(), unit("u", 2, prompts=lambda n: "own prompt" if n else None))
    assert [request.prompt for call in replicas.calls for request in call] == [
        "describe",
        "own prompt",
    ]


def test_calls_are_small() -> None:
    async def body() -> None:
        await Labeller(labeller_settings(config(), slots=40), replicas).label_unit(unit("u", 160))

    replicas = RecordingReplica(slots=40)
    asyncio.run(asyncio.wait_for(body(), 30))
    assert [len(call) for call in replicas.calls] == [16] * 10


@pytest.mark.parametrize(("replicas", "unit_rows"), [(1, 256), (8, 256), (8, 16), (1, 0)])
def test_concurrent_units_hold_enough_rows_to_fill_the_admission_bound(
    replicas: int, unit_rows: int
) -> None:
    settings = labeller_settings(config(), replicas=replicas, slots=64, unit_rows=unit_rows)
    assert settings.units_at_once >= 4
    in_flight = replicas * (64 + 2 * 16)
    assert (settings.units_at_once - 1) * max(1, unit_rows) >= in_flight


@pytest.mark.parametrize("replicas", [1, 7, 8, 9, 64])
def test_an_actor_holds_no_more_than_a_gibibyte_of_units_and_its_share_of_the_replicas(
    replicas: int,
) -> None:
    actors = actors_for(replicas)
    assert replicas / 8 <= actors < replicas / 8 + 1
    settings = labeller_settings(
        config(), replicas=replicas, slots=64, actors=actors, unit_rows=16, unit_bytes=2**26,
        kv_token_capacity=10**6,
    )  # fmt: skip
    assert settings.units_at_once <= 16
    assert settings.bytes_in_flight <= (256 + 8 * 64) * 2**20
    assert actors * settings.rows_running >= replicas * 64
    assert settings.rows_running <= 8 * 64
    assert actors * (settings.tokens or 0) <= 10**6


def test_an_actor_admits_as_much_as_the_live_replicas_hold() -> None:
    class MeasuringReplica(RecordingReplica):
        in_flight = most = 0

        async def label(
            self, requests: Sequence[LabelRequest], *, priority: Priority
        ) -> list[Result]:
            self.in_flight += len(requests)
            self.most = max(self.most, self.in_flight)
            try:
                return await super().label(requests, priority=priority)
            finally:
                self.in_flight -= len(requests)

    async def body(live: Callable[[], Awaitable[int | None]]) -> int:
        replicas = MeasuringReplica(slots=64)
        settings = labeller_settings(config(), replicas=4)
        labeller = Labeller(settings, replicas, live)
        await labeller.resize_to_live()
        await labeller.label_unit(unit("u", 100))
        return replicas.most

    async def one() -> int | None:
        return 1

    async def unknown() -> int | None:
        return None

    async def failing() -> int | None:
        raise RuntimeError("Serve's controller restarts")

    assert asyncio.run(asyncio.wait_for(body(one), 30)) == 4 + 8
    assert asyncio.run(asyncio.wait_for(body(unknown), 30)) == 4 * (4 + 8)
    assert asyncio.run(asyncio.wait_for(body(failing), 30)) == 4 * (4 + 8)


class NeverAnsweringReplica(RecordingReplica):
    """A call to a deployment without replicas waits in Serve's router."""

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        await asyncio.get_running_loop().create_future()
        raise AssertionError


def test_a_run_waits_for_replicas_to_come_back_but_not_for_ever() -> None:
    async def none() -> int | None:
        return 0

    async def body(live: Callable[[], Awaitable[int | None]]) -> float:
        loop = asyncio.get_running_loop()
        labeller = Labeller(labeller_settings(config()), NeverAnsweringReplica(slots=4), live)
        with pytest.raises(FleetUnavailable, match="same command again"):
            await labeller(pack_unit(unit("u", 3)))
        ended = loop.time()
        with pytest.raises(FleetUnavailable):
            await labeller(pack_unit(unit("v", 3)))
        assert loop.time() == ended
        return ended

    assert run_in_virtual_time(body(none)) == pytest.approx(PATIENCE_SECONDS, abs=20)


def test_rows_in_flight_are_bounded_in_tokens_once_their_length_is_known() -> None:
    class CountingReplica(RecordingReplica):
        in_flight = 0
        known = 0  # results of completed calls

        async def label(
            self, requests: Sequence[LabelRequest], *, priority: Priority
        ) -> list[Result]:
            self.in_flight += len(requests)
            observed.append((self.known, self.in_flight))
            results = await super().label(requests, priority=priority)
            self.in_flight -= len(requests)
            self.known += len(results)
            return results

    async def body() -> None:
        run = config()
        length = len("describe") + VISUAL_TOKENS // 2 + run.generation.max_new_tokens
        settings = labeller_settings(run, replicas=4, kv_token_capacity=5 * length)
        await Labeller(settings, CountingReplica()).label_unit(unit("u", 200))

    observed: list[tuple[int, int]] = []
    asyncio.run(asyncio.wait_for(body(), 30))
    assert max(rows for known, rows in observed if not known) == 4 * (4 + 8)
    # At most 5 run and 32 wait, in calls of 4.
    assert max(rows for known, rows in observed if known >= 48) == 36


# The tests below run on a real Ray and Serve.


def label_on(fleet: Fleet, run: RunConfig, run_id: str, *units: pa.Table) -> list[dict[str, Any]]:
    """The labelled rows, in unit and row order."""
    settings = labeller_settings(run, run_id, app=fleet.app, deployment=fleet.deployment, slots=4)
    packed = ray.data.from_arrow([pack_unit(table) for table in units])
    blocks = [ray.get(block) for block in label_units(packed, settings).to_arrow_refs()]
    rows = [row for block in blocks for table in unpack_units(block) for row in table.to_pylist()]
    return sorted(rows, key=lambda row: (row["unit_id"], row["unit_row"]))


def kill_once_busy(fleet: Fleet) -> None:
    """Kills the fleet's replica once it has labelled a few more rows."""
    started = fleet.stats().rows
    while fleet.stats().rows < started + 4:
        time.sleep(0.1)
    os.kill(fleet.stats().replicas[0].pid, signal.SIGKILL)


def test_ray_data_does_not_fuse_the_reader_into_the_labeller(fleet: Fleet, tmp_path: Path) -> None:
    """If fused, each read would block the event loop that sends the calls."""
    pq.write_table(pack_unit(unit("u", 6)), tmp_path / "u.parquet")
    settings = labeller_settings(config(), app=fleet.app, deployment=fleet.deployment)
    labelled = label_units(ray.data.read_parquet(str(tmp_path)), settings).materialize()
    assert labelled.count() == 1
    assert "->MapBatches(Labeller)" not in labelled.stats()
    assert "MapBatches(Labeller)" in labelled.stats()


def test_killing_a_replica_neither_loses_nor_duplicates_a_row(fleet: Fleet) -> None:
    pid = fleet.stats().replicas[0].pid
    # Its first calls take two seconds each: the kill finds some of them waiting or in a step.
    slow = unit("u0", 40, prompts=lambda row: "slow" if row < 20 else None)
    units = [slow, *(unit(f"u{n}", 40) for n in range(1, 6))]

    killer = threading.Thread(target=kill_once_busy, args=(fleet,))
    killer.start()
    rows = label_on(fleet, config(), "killed", *units)
    killer.join()

    assert fleet.stats().replicas[0].pid != pid
    assert [(r["unit_id"], r["unit_row"]) for r in rows] == [
        (f"u{u}", n) for u in range(6) for n in range(40)
    ]
    assert {r["error_code"] for r in rows} == {None}
    assert {r["text"] for r in rows if r["unit_row"] == 7} == {expected_text(picture(7), 50)}
    assert max(r["attempts"] for r in rows) > 1


@pytest.mark.slow
def test_a_row_that_kills_its_replica_is_isolated_and_the_rest_is_labelled(fleet: Fleet) -> None:
    """Takes four replica deaths, each followed by the start of a replica."""
    poisoned = unit("u", 10, prompts=lambda n: "die" if n == 5 else None)
    rows = label_on(fleet, config(max_attempts=2), "poison", poisoned, unit("v", 10))
    assert max(row["attempts"] for row in rows) == 4
    bad = [(r["unit_id"], r["unit_row"]) for r in rows if r["error_code"] == "poison_row"]
    assert bad == [("u", 5)]
    assert len(rows) == 20
    assert sum(r["error_code"] is None for r in rows) == 19


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stopped_replica_and_a_row_that_hangs_its_engine_cost_no_row(serving: str) -> None:
    """The watchdog kills both replicas that beat no more; the row is found."""
    engine = EngineSettings(
        model="watched", engine=ENGINE, slots=4, first_step_seconds=8.0, step_seconds=8.0
    )
    with open_fleet(FleetSettings(engine=engine)) as fleet:
        pid = fleet.stats().replicas[0].pid
        os.kill(pid, signal.SIGSTOP)
        units = [unit("u", 12, prompts=lambda n: "hang" if n == 5 else None), unit("v", 12)]
        rows = label_on(fleet, config(max_attempts=1), "hung", *units)
    bad = [(r["unit_id"], r["unit_row"]) for r in rows if r["error_code"] == "poison_row"]
    assert bad == [("u", 5)]
    assert sum(r["error_code"] is None for r in rows) == 23
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_controllers_stop_reason_stops_the_run_before_the_next_unit(local_ray: None) -> None:
    controller, failing = get_controller(), RunName("failing", config().output)
    ray.get(
        controller.register.remote(
            failing,
            meta={},
            units_total=3,
            rows_total=30,
            units_done=[],
            ledger_so_far=UnitLedger(),
            max_error_share=0.5,
            error_share_after=5,
        )
    )
    report_commit(
        RunName("failing", config().output), "a", UnitLedger(rows=10, failed={"read_failed": 9})
    )
    with pytest.raises(ErrorShareExceeded, match="9 of the 10 rows"):
        label(config(), unit("u", 2), run_id="failing")
    ray.kill(controller)


def test_a_missing_controller_does_not_stop_a_run(local_ray: None) -> None:
    table, _ = label(config(), unit("u", 2), run_id="nobody-knows")
    assert table["error_code"].to_pylist() == [None, None]
