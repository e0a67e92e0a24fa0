"""How much is measured: enough for the stated precision, spread over the corpus, within the stated
cost, and the same blocks in every attempt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.accounting.control_plan import COST_SHARE, HALF_WIDTH, ControlPlan
from cluster.accounting.ledger import UnitLedger
from cluster.accounting.speedup import NANO, Block, measured_ratio
from cluster.accounting.steady_part import BLOCK_SLOTS

SLOTS = 16
BLOCK = BLOCK_SLOTS * SLOTS


def units(count: int, rows: int = 256) -> list[tuple[str, int]]:
    return [(f"unit {number}", rows) for number in range(count)]


def plan(count: int, rows: int = 256, asked: int | None = None, run: str = "run") -> ControlPlan:
    return ControlPlan.of(run, units(count, rows), slots=SLOTS, asked=asked)


class Run:
    """A run whose units are labelled one after the other, those that the plan names first."""

    def __init__(
        self,
        control: ControlPlan,
        names: Sequence[str],
        *,
        ratio: float | Callable[[int], float],
        noise: float,
        seed: int,
    ) -> None:
        """ratio: of all units, or by a unit's place in the corpus."""
        self.draw = np.random.default_rng(seed)
        self.ledger = UnitLedger()
        self.measured: dict[str, Block] = {}
        self.lost: set[str] = set()
        first = set(control.first)
        for name in sorted(names, key=lambda name: name not in first):
            place = int(name.split()[1])
            self.label(control, name, ratio(place) if callable(ratio) else ratio, noise)

    def label(self, control: ControlPlan, name: str, ratio: float, noise: float) -> None:
        unit = UnitLedger(rows=256, nanoseconds=256 * NANO // 10)
        if control.draw(name, range(256)) and control.allows(
            name, self.ledger, (), self.lost, self.measured
        ):
            pruned, dense = np.exp(noise * self.draw.standard_normal(2)) * BLOCK * NANO / 10
            block = Block(int(pruned), int(ratio * dense), BLOCK)
            unit += UnitLedger(blocks=(block,), control_nanoseconds=block.dense)
            self.measured[name] = block
        elif control.loses(name, unit):
            self.lost.add(name)
        self.ledger += unit


def test_ten_million_rows_are_measured_for_less_than_a_thousandth_of_them() -> None:
    """To the stated precision, on a noisy machine: 30 % either way, block by block."""
    names = [name for name, _ in units(40_000)]
    for seed in range(4):
        control = plan(40_000, run=f"run {seed}")
        run = Run(control, names, ratio=2.5, noise=0.2, seed=seed)
        found = measured_ratio(run.ledger.blocks)
        assert found is not None
        assert found.half_width is not None
        assert found.half_width < 2 * HALF_WIDTH
        assert run.ledger.control_rows <= 1e-3 * 40_000 * 256
        assert run.ledger.control_nanoseconds <= 1e-3 * run.ledger.nanoseconds
        places = sorted(int(name.split()[1]) for name in run.measured)
        assert places[-1] > 30_000, "over the whole corpus"


def test_a_steady_machine_is_measured_with_few_blocks_and_a_noisy_one_with_more() -> None:
    names = [name for name, _ in units(2_000)]
    counts = [
        len(Run(plan(2_000), names, ratio=2.0, noise=noise, seed=1).measured)
        for noise in (0.01, 0.15, 0.6)
    ]
    assert counts[0] == 10
    assert counts[0] < counts[1] < counts[2]
    assert counts[2] == 56


def test_the_interval_of_a_run_that_stops_by_its_own_precision_holds_the_true_ratio() -> None:
    """Stein's two stages: how many blocks are measured depends on the first ones."""
    names = [name for name, _ in units(400)]
    held = 0
    for seed in range(300):
        run = Run(plan(400, run=f"run {seed}"), names, ratio=2.5, noise=0.15, seed=seed)
        found = measured_ratio(run.ledger.blocks)
        assert found is not None
        held += (found.low or 0) <= 2.5 <= (found.high or math.inf)
    assert held / 300 >= 0.93


def test_a_part_of_the_corpus_that_differs_has_no_more_blocks_than_its_share() -> None:
    """Units of the last fifth have ratio 4, the others 1.2: were blocks measured on wherever they
    turn out to differ, the last fifth would have most of them."""
    names = [name for name, _ in units(1_000)]
    true, last, measured, off = 0.8 * 1.2 + 0.2 * 4.0, 0, 0, list[float]()
    for seed in range(60):
        control = plan(1_000, run=f"run {seed}")
        run = Run(
            control, names, ratio=lambda place: 4.0 if place >= 800 else 1.2, noise=0.03, seed=seed
        )
        found = measured_ratio(run.ledger.blocks)
        assert found is not None
        off.append(found.ratio / true - 1)
        measured += len(run.measured)
        last += sum(int(name.split()[1]) >= 800 for name in run.measured)
    assert 0.15 < last / measured < 0.25
    assert abs(np.mean(off)) < 0.06


def test_how_many_are_measured_is_the_same_in_every_attempt() -> None:
    """Whatever later blocks say: a resumed run knows them from the first moment."""
    control = plan(2_000)
    order = list(control.ranks)
    first = {name: Block(100, 200 + 7 * n, BLOCK) for n, name in enumerate(order[:5])}
    later = {name: Block(100, 900 - 80 * n, BLOCK) for n, name in enumerate(order[5:15])}
    asked = [
        [name for name in order if control.allows(name, UnitLedger(), (), (), known)]
        for known in (first, first | later, later | first)
    ]
    assert asked[0] == asked[1] == asked[2] == order[: len(asked[0])]


@given(
    count=st.integers(1, 3_000),
    rows=st.integers(1, 512),
    ratio=st.floats(0.5, 3.0),
    seed=st.integers(0, 100),
)
def test_measuring_never_costs_more_than_the_stated_share(
    count: int, rows: int, ratio: float, seed: int
) -> None:
    control = ControlPlan.of(f"run {seed}", units(count, rows), slots=SLOTS)
    assert bool(control.ranks) == (control.reason is None)
    ledger, granted = UnitLedger(), set[str]()
    for name in control.ranks:
        if not control.allows(name, ledger, granted):
            continue
        granted.add(name)
        if len(granted) == 4:  # four are under way at once
            blocks = tuple(Block(BLOCK * NANO, int(ratio * BLOCK * NANO), BLOCK) for _ in granted)
            ledger += UnitLedger(
                rows=4 * rows,
                nanoseconds=4 * rows * NANO,
                blocks=blocks,
                control_nanoseconds=sum(block.dense for block in blocks),
            )
            granted.clear()
    whole = count * rows * NANO
    spent = ledger.control_nanoseconds + len(granted) * ratio * BLOCK * NANO
    assert spent <= COST_SHARE * whole * 1.0001


def test_a_small_corpus_is_not_measured_unless_asked_to() -> None:
    small = plan(8)  # 2,048 rows
    assert not small.ranks
    assert small.reason is not None
    assert "2,048 rows are too few" in small.reason
    assert "a run with --control-blocks 5 measures anyway" in small.reason
    assert "--control-blocks 4 measures anyway, without an interval" in (plan(4).reason or "")
    asked = plan(8, asked=5)
    assert asked.reason is None
    allowed = [name for name, _ in units(8) if asked.allows(name, UnitLedger(), ())]
    assert len(allowed) == 5
    assert not asked.first, "spread over the run's time too"


def test_units_that_hold_no_whole_block_are_not_measured_unless_asked_to() -> None:
    short = plan(40_000, rows=20)
    assert not short.ranks
    assert "0 of 40000 units have the 32 rows" in (short.reason or "")
    asked = plan(40_000, rows=20, asked=5)
    assert [len(asked.draw(name, range(20))) for name in asked.ranks] == [20] * 100


def test_units_of_large_images_hold_smaller_blocks() -> None:
    """A unit has 64 MiB at most: of a replica with 64 slots four rows a slot are seldom in it."""
    names = units(1_000, rows=40)
    control = ControlPlan.of("run", names, slots=SLOTS)
    assert control.reason is None
    name = control.first[0]
    assert len(control.draw(name, range(40))) == 40
    assert len(control.draw(name, range(32))) == 32, "some cannot be sent"
    assert control.draw(name, range(31)) == []
    assert control.loses("x", UnitLedger(rows=40, failed={"image_undecodable": 9}))
    assert not control.loses("x", UnitLedger(rows=40, failed={"image_undecodable": 8}))


def test_fewer_units_than_blocks_that_were_asked_for_are_named() -> None:
    assert plan(3, asked=5).reason == "5 control blocks were asked for: each of 3 units has one"
    assert len(plan(3, asked=5).ranks) == 3
    assert plan(5, asked=5).reason is None


def test_none_are_measured_where_none_are_asked_for() -> None:
    none = plan(40_000, asked=0)
    assert not none.ranks
    assert not none.allows("unit 1", UnitLedger(), ())


def test_a_block_that_was_not_measured_is_replaced_by_the_next_one() -> None:
    asked = plan(40, asked=3)
    order = list(asked.ranks)

    def allowed(*lost: str) -> int:
        allowed = [asked.allows(name, UnitLedger(), (), lost) for name in order]
        assert allowed == sorted(allowed, reverse=True)
        return sum(allowed)

    assert allowed() == 3
    assert allowed(order[1]) == 4
    assert allowed(order[5]) == 3, "it was not wanted"
    assert allowed(order[1], order[3]) == 5
    assert allowed("of no plan") == 3


def test_blocks_that_are_asked_for_late_are_of_units_that_are_left() -> None:
    """Nine in ten units were labelled before, none of them with a block."""
    asked = plan(200, asked=5)
    before = UnitLedger(rows=256)
    assert asked.loses("x", before)
    lost = [name for name, _ in units(180)]
    left = [name for name, _ in units(200)][180:]
    allowed = [name for name in left if asked.allows(name, UnitLedger(), (), lost)]
    assert len(allowed) == 5
    assert not asked.loses("x", UnitLedger(rows=256, blocks=(Block(1, 1, BLOCK),)))


def test_a_unit_whose_block_was_wanted_is_replaced() -> None:
    """Also one of the first that an attempt labelled which measured nothing."""
    control, before = plan(2_000), UnitLedger(rows=256)
    order = list(control.ranks)
    assert control.loses(order[4], before)
    assert not control.loses(order[5], before), "it was not wanted"
    assert control.loses(order[5], UnitLedger(rows=256, blocks_spoiled=1))
    assert not control.loses(order[4], UnitLedger(rows=256, blocks=(Block(1, 1, BLOCK),)))
    ledger = UnitLedger(rows=1280, nanoseconds=1280 * NANO)
    allowed = [name for name in order if control.allows(name, ledger, (), order[1:3])]
    assert allowed == order[:7]


def test_blocks_that_replace_spoiled_ones_stay_within_the_cost() -> None:
    """On an endpoint that is never quiet each block is spoiled, and is paid for all the same."""
    control = plan(75)
    ledger, lost, tried = UnitLedger(), set[str](), 0
    for name in control.ranks:
        unit = UnitLedger(rows=256, nanoseconds=256 * NANO)
        if control.allows(name, ledger, (), lost):
            tried += 1
            unit += UnitLedger(blocks_spoiled=1, control_nanoseconds=3 * BLOCK * NANO)
            lost.add(name)
        ledger += unit
    assert tried >= 5
    assert ledger.control_nanoseconds <= COST_SHARE * 75 * 256 * NANO * 1.001


@given(order=st.permutations(range(24)), lost=st.sets(st.integers(0, 23)), asked=st.integers(1, 12))
def test_as_many_blocks_are_measured_as_were_asked_for_in_whatever_order_units_come(
    order: list[int], lost: set[int], asked: int
) -> None:
    """lost: units whose block is spoiled. With enough units left, exactly so many are measured."""
    control = plan(24, asked=asked)
    names = [f"unit {number}" for number in range(24)]
    measured, passed = set[str](), set[str]()
    for number in order:
        name = names[number]
        if control.allows(name, UnitLedger(), (), passed) and number not in lost:
            measured.add(name)
        else:
            passed.add(name)
    assert len(measured) <= asked
    if not lost:
        assert len(measured) == asked


def test_the_block_of_a_unit_is_the_same_in_every_attempt_and_other_runs_have_others() -> None:
    same, again, other = plan(100, asked=9), plan(100, asked=9), plan(100, asked=9, run="other")
    assert same == again
    assert list(same.ranks) != list(other.ranks)
    name = next(iter(same.ranks))
    drawn = same.draw(name, range(256))
    assert (
        list(drawn) == list(range(drawn[0], drawn[0] + BLOCK)) == list(again.draw(name, range(256)))
    )
    starts = {same.draw(unit, range(256))[0] for unit in same.ranks}
    assert len(starts) > 5, "not always the first rows of a unit"
    assert same.draw("unit of another run", range(256)) == []


def test_each_way_is_first_in_half_of_the_blocks() -> None:
    control = plan(1_000, asked=20)
    ways = [control.dense_first(name) for name in list(control.ranks)[:20]]
    assert sum(ways) == 10


def test_too_few_rows_that_can_be_sent_give_no_block() -> None:
    control = plan(40_000)
    name = next(iter(control.ranks))
    assert control.draw(name, range(2 * SLOTS - 1)) == []
    assert len(control.draw(name, range(BLOCK))) == BLOCK
    assert len(control.draw(name, range(BLOCK + 9))) == BLOCK


def test_blocks_that_say_nothing_of_their_spread_are_measured_up_to_the_most() -> None:
    control = plan(40_000)
    lopsided = (Block(10**18, 10**15, BLOCK), *(Block(1, 1, BLOCK),) * 4)
    measured = dict(zip(control.ranks, lopsided, strict=False))
    ledger = UnitLedger(rows=10**6, nanoseconds=10**21, blocks=lopsided)
    allowed = [n for n in control.ranks if control.allows(n, ledger, (), (), measured)]
    assert len(allowed) == 56


def test_the_first_blocks_are_measured_whatever_they_turn_out_to_cost() -> None:
    """Four of five would say less than none. Of the others none is measured at such a cost."""
    control = plan(75)
    dear = Block(BLOCK * NANO, 50 * BLOCK * NANO, BLOCK)
    measured = dict.fromkeys(control.first[:4], dear)
    ledger = UnitLedger(
        rows=1024,
        nanoseconds=1024 * NANO,
        blocks=(dear,) * 4,
        control_nanoseconds=4 * dear.dense,
    )
    allowed = [n for n in control.ranks if control.allows(n, ledger, (), (), measured)]
    assert allowed == list(control.first)
