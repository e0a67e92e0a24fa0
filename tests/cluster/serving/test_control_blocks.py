"""Control blocks: both arms take the ordinary way with empty caches, alone among batch rows, and
never in an online request's way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.errors import Busy
from cluster.protocol import BlockAnswers, LabelRequest, Priority
from cluster.serving.control_blocks import _Arm
from cluster.serving.replica import VLMReplica
from sppruner.engine.interface import Result
from sppruner.spec import Budget, PruneSpec
from tests.cluster.fake_engine import VISUAL_TOKENS, expected_text, picture
from tests.cluster.serving.test_replica import run, settings, start_decoding

HALF = PruneSpec(method="m", budget=Budget(ratio=0.5))
ROWS = 8  # twice the slots


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "batches"


def row(number: int, prompt: str = "describe") -> LabelRequest:
    return LabelRequest(id=f"r{number}", prompt=prompt, images=(picture(number),), spec=HALF)


def block(first: int = 0) -> list[LabelRequest]:
    return [row(number) for number in range(first, first + ROWS)]


def lines(journal: Path) -> list[str]:
    return journal.read_text().splitlines() if journal.exists() else []


async def until(journal: Path, text: str) -> None:
    while text not in journal.read_text() if journal.exists() else True:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("dense_first", [False, True])
def test_both_arms_are_answered_in_full_batches_with_empty_caches(
    journal: Path, dense_first: bool
) -> None:
    answers = run(settings(journal), lambda r: r.label_block(block(), dense_first=dense_first))
    assert [r.text for r in answers.pruned] == [expected_text(picture(n), 50) for n in range(ROWS)]
    assert [r.text for r in answers.dense or ()] == [
        expected_text(picture(n), VISUAL_TOKENS) for n in range(ROWS)
    ]
    pruned = ["r0 r1 r2 r3", "r4 r5 r6 r7"]
    dense = ["r0* r1* r2* r3*", "r4* r5* r6* r7*"]
    arms = [sorted(arm.splitlines()) for arm in journal.read_text().split("cleared\n")]
    warm_up = dense[:1]
    assert arms == [[], warm_up, *([dense, pruned] if dense_first else [pruned, dense])]


def test_only_the_first_block_of_a_process_pays_for_a_warm_up(journal: Path) -> None:
    async def scenario(replica: VLMReplica) -> list[BlockAnswers]:
        return [await replica.label_block(block(8 * n), dense_first=False) for n in range(2)]

    first, second = run(settings(journal, seconds=0.05), scenario)
    assert first.discarded_seconds >= 0.05
    assert second.discarded_seconds == 0.0


def test_the_seconds_of_an_arm_are_the_replica_s_time(journal: Path) -> None:
    """Two batches a side, each of 0.1 s."""
    answers = run(
        settings(journal, seconds=0.1), lambda r: r.label_block(block(), dense_first=True)
    )
    for results in (answers.pruned, answers.dense or ()):
        assert sum(result.seconds for result in results) == pytest.approx(0.2, abs=0.1)
        assert {bool(result.device) for result in results} == {True}


def test_the_steady_part_of_an_arm_is_the_pace_of_full_batches(journal: Path) -> None:
    """Four batches a side, each of 0.2 s, of four rows; decoding of the first one is not in it."""
    rows = [row(number) for number in range(16)]
    answers = run(settings(journal, seconds=0.2), lambda r: r.label_block(rows, dense_first=True))
    for steady in (answers.pruned_steady, answers.dense_steady):
        assert len(steady) == 8, "two batches of four"
        assert sum(steady.values()) == pytest.approx(0.4, abs=0.05)


def test_a_row_that_failed_has_no_part_in_the_pace(journal: Path) -> None:
    rows = [*block()[:-1], row(7, "bad")]
    answers = run(settings(journal), lambda r: r.label_block(rows, dense_first=False))
    assert answers.pruned_steady
    assert not {"r7"} & {*answers.pruned_steady, *answers.dense_steady}


def arm(times: dict[str, float], failed: str = "") -> _Arm:
    results = [
        Result(
            id=name, text=None if name in failed else "", error_code="x" if name in failed else None
        )
        for name in times
    ]
    return _Arm(results=results, began=0.0, ended=times)


@pytest.mark.parametrize("failed", ["", "b", "bf", "bdfh"])
def test_rows_that_fail_one_way_leave_the_pace_of_the_others_as_it_is(failed: str) -> None:
    """In the arm where they were answered their time is theirs. Taken from the order, it would be
    that of the next row, and the arm as slow as its failed rows are many."""
    names = "abcdefghijklmnop"
    whole = arm({name: 1.0 + number for number, name in enumerate(names)})
    other = arm({name: 1.0 for name in names}, failed=failed)
    steady = whole.steady(other, 4)
    assert set(steady) == set("efghijkl") - set(failed)
    assert set(steady.values()) == {1.0}


def test_rows_that_fail_both_ways_are_in_no_arm() -> None:
    """They fail before they have a slot, at once."""
    times = {"x": 0.1, "y": 0.1} | {name: 1.0 + n for n, name in enumerate("abcdefghijklmnop")}
    one, other = arm(times, failed="xy"), arm(times, failed="xy")
    steady = one.steady(other, 4)
    assert list(steady) == list("efghijkl")


def test_other_batch_rows_wait_for_the_block_and_it_for_those_that_run(journal: Path) -> None:
    async def scenario(replica: VLMReplica) -> None:
        before = asyncio.create_task(replica.label([row(90)], priority=Priority.BATCH))
        await until(journal, "r90")
        measured = asyncio.create_task(replica.label_block(block(), dense_first=False))
        await asyncio.sleep(0.01)
        with pytest.raises(Busy):
            await replica.label_block(block(20), dense_first=False)
        after = asyncio.create_task(replica.label([row(91)], priority=Priority.BATCH))
        await asyncio.gather(before, measured, after)
        assert measured.result().dense is not None

    run(settings(journal, seconds=0.05), scenario)
    batches = [line for line in lines(journal) if line != "cleared"]
    assert batches[0] == "r90"
    assert batches[-1] == "r91"


@pytest.mark.parametrize("dense_first", [False, True])
@pytest.mark.parametrize("arrives_densely", [False, True])
def test_an_online_request_spoils_the_block_and_waits_for_one_step_at_most(
    journal: Path, dense_first: bool, arrives_densely: bool
) -> None:
    """What is left of a dense arm is dropped; pruned rows are answered all the same."""
    rows = [row(number) for number in range(24)]  # six batches a side

    def batches_of_block(dense: bool) -> list[str]:
        return [
            line
            for line in lines(journal)
            if line.split()[0].rstrip("*") in {one.id for one in rows} and ("*" in line) == dense
        ]

    async def scenario(replica: VLMReplica) -> tuple[BlockAnswers, int]:
        await start_decoding(replica)
        first = await replica.label_block([row(n, "warm") for n in range(40, 48)], dense_first=True)
        assert first.dense is not None
        measured = asyncio.create_task(replica.label_block(rows, dense_first=dense_first))
        while not batches_of_block(arrives_densely):
            await asyncio.sleep(0.005)
        dense_before, before = len(batches_of_block(True)), len(lines(journal))
        await replica.label([row(99)], priority=Priority.ONLINE)
        between = [line for line in lines(journal)[before:] if line != "cleared"]
        assert "r99" in [line.rstrip("*") for line in between[:2]], "decoding takes a moment"
        return await measured, dense_before

    answers, dense_before = run(settings(journal, seconds=0.2), scenario)
    assert [r.text for r in answers.pruned] == [expected_text(picture(n), 50) for n in range(24)]
    assert answers.dense is None
    dense_batches = len(batches_of_block(True))
    assert dense_batches <= dense_before + 1
    if arrives_densely:
        assert 1 <= dense_batches <= 3, "the others were dropped"
    else:
        assert dense_batches == (6 if dense_first else 0), "an arm of a spoiled block is not begun"
    assert (answers.discarded_seconds > 0) == (dense_batches > 0)


def test_a_block_that_meets_online_requests_is_answered_pruned_only(journal: Path) -> None:
    async def scenario(replica: VLMReplica) -> BlockAnswers:
        online = asyncio.create_task(replica.label([row(99)], priority=Priority.ONLINE))
        await until(journal, "r99")
        answers = await replica.label_block(block(), dense_first=True)
        await online
        again = await replica.label_block(block(20), dense_first=True)
        assert again.dense is not None, "the next one is measured"
        return answers

    answers = run(settings(journal, seconds=0.1), scenario)
    assert answers.dense is None
    assert [r.error_code for r in answers.pruned] == [None] * ROWS


def test_a_cancelled_block_leaves_the_replica_free(journal: Path) -> None:
    async def scenario(replica: VLMReplica) -> None:
        measured = asyncio.create_task(replica.label_block(block(), dense_first=True))
        await until(journal, "r0*")
        measured.cancel()
        with pytest.raises(asyncio.CancelledError):
            await measured
        assert (await replica.stats()).batch_rows_in_flight == 0
        (result,) = await replica.label([row(50)], priority=Priority.BATCH)
        assert result.text == expected_text(picture(50), 50)

    run(settings(journal, seconds=0.1), scenario)


def test_rows_that_fail_densely_have_no_twin(journal: Path) -> None:
    rows = [*block()[:-1], row(7, "bad")]
    answers = run(settings(journal), lambda r: r.label_block(rows, dense_first=False))
    assert [r.error_code for r in answers.pruned] == [None] * 7 + ["prompt_invalid"]
    assert [r.error_code for r in answers.dense or ()] == [None] * 7 + ["prompt_invalid"]
