"""Suite `saving`: the saving that a run prints against separate runs, dense and pruned.

The same corpus is labelled three times in turn: pruned and measured, as jobs do it; pruned without
measuring; and densely. What the first prints should be what the others took: the ratio of the
replica time of their rows. One case asks one question an image, the other five, of which caches
spare four images. Every second round has the reverse order. Each run has new replicas, which other
rows have warmed up: on those of the run before it would find its images in the cache. Columns:

- printed: dense over pruned of the measured run, over the rounds. low, high: its interval in each
  round, lowest and highest end.
- separate: replica seconds of the dense run over those of the pruned one. wall: the same of their
  seconds from first read to last commit, the start of the labelling actors included. The machine's
  speed changes between the two: separate low and high are ends of the interval by their units.
- held: rounds whose interval holds `separate`. agreed: rounds whose two ratios differ by no more
  than both intervals together allow.
- doubts: rounds whose blocks do not speak for the run's rows, so that no time saved is stated.
- measuring: seconds spent on control over the replica time of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rich.console import Console

from cluster.accounting.speedup import Block, MeasuredRatio, measured_ratio
from cluster.accounting.steady_part import BLOCK_SLOTS
from cluster.config import RunConfig
from cluster.demo import DrawnRow, encode_parquet
from cluster.output.run_output import RunOutput
from cluster.output.summary import Attempt, Summary
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import open_fleet
from cluster.serving.ray_session import join_ray
from cluster.store import open_store
from jobs.suites.corpora import draw_squares
from jobs.suites.labelling import SPEC, count_replica_threads, run_job
from jobs.suites.random_models import save
from jobs.suites.result import alternate, describe_machine, summarise_rounds
from jobs.suites.shapes import ModelShape
from sppruner.engine import SamplingParams
from sppruner.models.loading import EMBEDDED, resolve_model
from sppruner.spec import DENSE, PruneSpec

_SIDES: Final = ("measured", "pruned", "dense")
_QUESTIONS: Final = (
    "What is in the image?",
    "Which colours are there?",
    "How many objects are there?",
    "What is in the middle?",
    "Is there a sign?",
)
_ASKED: Final = (1, 5)
_BLOCKS: Final = 6
_NEW_TOKENS: Final = 8
_LONGER: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SavingRound:
    """One round of one case."""

    measured: Summary
    """Of the run that measures."""
    separate: MeasuredRatio
    """Replica seconds of the dense run over those of the pruned one, each unit as a block."""
    wall: float
    """Their wall seconds."""

    @property
    def holds(self) -> bool:
        """Whether the printed interval holds the separate ratio."""
        found = self.measured.measured
        if found is None or found.low is None or found.high is None:
            return False
        return found.low <= self.separate.ratio <= found.high

    @property
    def agrees(self) -> bool:
        """Whether printed and separate ratio differ within their intervals: both are of samples."""
        found = self.measured.measured
        if found is None or found.half_width is None or self.separate.half_width is None:
            return False
        apart = abs(math.log(found.ratio / self.separate.ratio))
        return apart <= math.hypot(found.half_width, self.separate.half_width)

    @property
    def doubted(self) -> bool:
        """Whether the run states no saving, since its blocks do not speak for its rows."""
        saving = self.measured.saving
        return saving is not None and bool(saving.doubts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavingCase:
    """One case over all rounds; the module docstring defines the columns."""

    case: str
    rows: int
    printed: dict[str, float]
    interval_low: float
    interval_high: float
    separate: dict[str, float]
    separate_low: float
    separate_high: float
    wall: dict[str, float]
    held: str
    agreed: str
    doubts: str
    measuring: dict[str, float]


def run_saving_suite(
    shape: ModelShape,
    *,
    dtype: str = "auto",
    quick: bool,
    root: str,
    environment: Mapping[str, str] | None = None,
    console: Console,
) -> dict[str, Any]:
    """root: URI prefix of corpora and labels. environment: variables with which Ray's workers reach
    it. Raises RunErrors as `run` does, and EngineError for rows that failed."""
    machine = describe_machine() | {"torch_threads": count_replica_threads()}
    rounds = 1 if quick else 2
    with ExitStack() as stack:
        model = EMBEDDED
        if shape.widths is not None:
            model = stack.enter_context(TemporaryDirectory(prefix=f"{shape.name}-"))
            save(shape, Path(model), dtype)
        work = _Workload(
            shape=shape,
            model=model,
            dtype=dtype,
            slots=4 if shape.widths else 16,
            root=root,
            environment=environment or {},
            console=console,
        )
        join_ray(stack, environment)  # one for all runs; replicas come and go
        rounds_of = {
            asked: [work.run_round(asked, number) for number in range(rounds)] for asked in _ASKED
        }
    return {
        "suite": "saving",
        "machine": machine
        | {"model": shape.name, "dtype": dtype, "slots": work.slots, "rounds": rounds},
        "cases": [
            asdict(_make_case(asked, work.rows, found)) for asked, found in rounds_of.items()
        ],
        "ratios": {
            f"printed_vs_separate_{asked}_questions": summarise_rounds(
                [_printed(one) / one.separate.ratio for one in found]
            )
            for asked, found in rounds_of.items()
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Workload:
    """What all runs of the suite share."""

    shape: ModelShape
    model: str
    dtype: str
    slots: int
    root: str
    environment: Mapping[str, str]
    console: Console

    @property
    def block_rows(self) -> int:
        """Rows of a control block, and of a unit."""
        return BLOCK_SLOTS * self.slots

    @property
    def rows(self) -> int:
        """Rows of a corpus: of the small model more than blocks have, since a run of seconds says
        little of any pace."""
        return _BLOCKS * self.block_rows * (1 if self.shape.widths else _LONGER)

    def run_round(self, asked: int, number: int) -> SavingRound:
        """Three runs of a corpus of the round's own, with so many questions an image."""
        place = f"{self.root}/{asked}-{number}"
        seed = 1 + number * len(_ASKED) + _ASKED.index(asked)
        self._write(f"{place}/corpus", self.rows, asked, seed)
        self._write(f"{place}/others", self.block_rows, asked, 0)
        pruned = self._config(f"{place}/corpus", SPEC)
        configs = {
            "measured": replace(pruned, control_blocks=_BLOCKS),
            "pruned": pruned,
            "dense": replace(pruned, spec=DENSE),
        }
        done: dict[str, tuple[Summary, Attempt]] = {}
        for side in alternate(_SIDES, number):
            what = f"{asked} questions an image, round {number + 1}: {side}"
            self.console.print(what, highlight=False)
            with open_fleet(self._fleet()):
                for spec in (SPEC, DENSE):
                    warm = self._config(f"{place}/others", spec)
                    output = f"{place}/{side}-others-{spec.method}"
                    run_job(replace(warm, output=output), self.console)
                config = replace(configs[side], output=f"{place}/{side}")
                done[side] = run_job(config, self.console)
        separate = compare_units(f"{place}/pruned", f"{place}/dense")
        return SavingRound(
            measured=done["measured"][0],
            separate=separate,
            wall=done["dense"][1].wall_seconds / done["pruned"][1].wall_seconds,
        )

    def _fleet(self) -> FleetSettings:
        revision = resolve_model(self.model).revision
        engine = EngineSettings(
            model=self.model, revision=revision, slots=self.slots, dtype=self.dtype
        )
        return FleetSettings(engine=engine, environment=self.environment)

    def _config(self, corpus: str, spec: PruneSpec) -> RunConfig:
        return RunConfig(
            kind="vqa",
            input=corpus,
            output="unset",
            model=self.model,
            prompt="{question}",
            spec=spec,
            dtype=self.dtype,
            generation=SamplingParams(max_new_tokens=_NEW_TOKENS),
            unit_rows=self.block_rows,
            slots=self.slots,
            control_blocks=0,
        )

    def _write(self, uri: str, rows: int, asked: int, seed: int) -> None:
        """A corpus whose files are one unit each."""
        store = open_store(uri)
        drawn = _draw(self.shape, rows, asked, seed)
        for number, first in enumerate(range(0, rows, self.block_rows)):
            data = encode_parquet(drawn[first : first + self.block_rows], "vqa")
            store.put(f"{number:05}.parquet", data)


def compare_units(pruned: str, dense: str) -> MeasuredRatio:
    """The ratio of two runs of one corpus, by the replica time of their units."""
    outputs = [RunOutput.open(uri) for uri in (pruned, dense)]
    units = sorted(outputs[0].committed_units())
    ledgers = zip(*(output.ledgers(units) for output in outputs), strict=True)
    found = measured_ratio(
        [Block(fast.nanoseconds, slow.nanoseconds, fast.rows) for fast, slow in ledgers]
    )
    assert found is not None
    return found


def _draw(shape: ModelShape, rows: int, asked: int, seed: int) -> list[DrawnRow]:
    images = draw_squares(-(-rows // asked), seed, shape.side)
    asking = [
        DrawnRow(key=f"{row.key}-{n}", image=row.image, question=_QUESTIONS[n], answer="")
        for row in images
        for n in range(asked)
    ]
    return asking[:rows]


def _printed(one: SavingRound) -> float:
    assert one.measured.measured is not None  # its blocks cannot be spoiled: nobody is online
    return one.measured.measured.ratio


def _make_case(asked: int, rows: int, rounds: Sequence[SavingRound]) -> SavingCase:
    intervals = [one.measured.measured for one in rounds]
    return SavingCase(
        case=f"{asked} question{'s' if asked > 1 else ''} an image",
        rows=rows,
        printed=summarise_rounds([_printed(one) for one in rounds]),
        interval_low=min(found.low or 0.0 for found in intervals if found is not None),
        interval_high=max(found.high or 0.0 for found in intervals if found is not None),
        separate=summarise_rounds([one.separate.ratio for one in rounds]),
        separate_low=min(one.separate.low or 0.0 for one in rounds),
        separate_high=max(one.separate.high or 0.0 for one in rounds),
        wall=summarise_rounds([one.wall for one in rounds]),
        held=f"{sum(one.holds for one in rounds)} of {len(rounds)}",
        agreed=f"{sum(one.agrees for one in rounds)} of {len(rounds)}",
        doubts=f"{sum(one.doubted for one in rounds)} of {len(rounds)}",
        measuring=summarise_rounds(
            [one.measured.total.control_seconds / one.measured.total.seconds for one in rounds]
        ),
    )
