"""Suite `saving`: the saving that a run prints against separate runs, dense and pruned.

The same corpus is labelled three times in turn: pruned and measured, as jobs do it; pruned without
measuring; and densely. What the first prints should be what the others took: the ratio of the
replica time of their rows. One case asks one question an image, the other five, of which caches
spare four images. Every round has its own images, and every second one the reverse order. Columns:

- printed: dense over pruned of the measured run, over the rounds. low, high: its interval in each
  round, lowest and highest end.
- separate: replica seconds of the dense run over those of the pruned one. wall: the same of their
  seconds from first read to last commit, the start of the actors included.
- held: rounds whose interval holds `separate`.
- measuring: seconds spent on control over the replica time of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rich.console import Console

from cluster.config import RunConfig
from cluster.demo import DrawnRow, encode_parquet
from cluster.output.summary import Attempt, Summary
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import open_fleet
from cluster.store import open_store
from jobs.suites.corpora import draw_squares
from jobs.suites.labelling import SPEC, count_replica_threads, run_job
from jobs.suites.random_models import save
from jobs.suites.result import alternate, describe_machine, summarise_rounds
from jobs.suites.shapes import ModelShape
from sppruner.engine import SamplingParams
from sppruner.models.loading import EMBEDDED, resolve_model
from sppruner.spec import DENSE

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SavingRound:
    """One round of one case."""

    measured: Summary
    """Of the run that measures."""
    separate: float
    """Replica seconds of the dense run over those of the pruned one."""
    wall: float
    """Their wall seconds."""

    @property
    def holds(self) -> bool:
        """Whether the printed interval holds the separate ratio."""
        found = self.measured.measured
        if found is None or found.low is None or found.high is None:
            return False
        return found.low <= self.separate <= found.high


@dataclass(frozen=True, slots=True, kw_only=True)
class SavingCase:
    """One case over all rounds; the module docstring defines the columns."""

    case: str
    rows: int
    printed: dict[str, float]
    interval_low: float
    interval_high: float
    separate: dict[str, float]
    wall: dict[str, float]
    held: str
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
    slots = 4 if shape.widths else 16
    rows = 2 * _BLOCKS * 2 * slots  # half of the rows are of blocks
    rounds = 1 if quick else 2
    with ExitStack() as stack:
        folder = None
        if shape.widths is not None:
            folder = stack.enter_context(TemporaryDirectory(prefix=f"{shape.name}-"))
            save(shape, Path(folder), dtype)
        model = folder or EMBEDDED
        served = EngineSettings(
            model=model, revision=resolve_model(model).revision, slots=slots, dtype=dtype
        )
        stack.enter_context(open_fleet(FleetSettings(engine=served, environment=environment or {})))
        rounds_of = {
            asked: [
                _run_round(shape, model, asked, rows, slots, dtype, number, root, console)
                for number in range(rounds)
            ]
            for asked in _ASKED
        }
    return {
        "suite": "saving",
        "machine": machine
        | {"model": shape.name, "dtype": dtype, "slots": slots, "rounds": rounds},
        "cases": [asdict(_make_case(asked, rows, found)) for asked, found in rounds_of.items()],
        "ratios": {
            f"printed_vs_separate_{asked}_questions": summarise_rounds(
                [_printed(one) / one.separate for one in found]
            )
            for asked, found in rounds_of.items()
        },
    }


def _run_round(
    shape: ModelShape,
    model: str,
    asked: int,
    rows: int,
    slots: int,
    dtype: str,
    number: int,
    root: str,
    console: Console,
) -> SavingRound:
    place = f"{root}/{asked}-{number}"
    seed = number * len(_ASKED) + _ASKED.index(asked)
    _write_corpus(f"{place}/corpus", _draw(shape, rows, asked, seed), file_rows=4 * slots)
    plain = RunConfig(
        kind="vqa",
        input=f"{place}/corpus",
        output="unset",
        model=model,
        prompt="{question}",
        spec=SPEC,
        dtype=dtype,
        generation=SamplingParams(max_new_tokens=_NEW_TOKENS),
        unit_rows=4 * slots,
        slots=slots,
        control_blocks=0,
    )
    configs = {
        "measured": replace(plain, control_blocks=_BLOCKS),
        "pruned": plain,
        "dense": replace(plain, spec=DENSE),
    }
    if number == 0:
        # No side pays for the first batches of its shapes, nor for the start of Ray's workers, of
        # which a corpus of this size takes several.
        for name, spec in (("pruned", SPEC), ("dense", DENSE)):
            run_job(replace(plain, spec=spec, output=f"{place}/warm-{name}"), console)
    done: dict[str, tuple[Summary, Attempt]] = {}
    for side in alternate(_SIDES, number):
        console.print(f"{asked} questions an image, round {number + 1}: {side}", highlight=False)
        done[side] = run_job(replace(configs[side], output=f"{place}/{side}"), console)
    (dense, slow), (pruned, fast) = done["dense"], done["pruned"]
    return SavingRound(
        measured=done["measured"][0],
        separate=dense.total.seconds / pruned.total.seconds,
        wall=slow.wall_seconds / fast.wall_seconds,
    )


def _draw(shape: ModelShape, rows: int, asked: int, seed: int) -> list[DrawnRow]:
    images = draw_squares(-(-rows // asked), seed, shape.side)
    asking = [
        DrawnRow(key=f"{row.key}-{n}", image=row.image, question=_QUESTIONS[n], answer="")
        for row in images
        for n in range(asked)
    ]
    return asking[:rows]


def _write_corpus(uri: str, rows: Sequence[DrawnRow], *, file_rows: int) -> None:
    store = open_store(uri)
    for number, first in enumerate(range(0, len(rows), file_rows)):
        data = encode_parquet(rows[first : first + file_rows], "vqa")
        store.put(f"{number:05}.parquet", data)


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
        separate=summarise_rounds([one.separate for one in rounds]),
        wall=summarise_rounds([one.wall for one in rounds]),
        held=f"{sum(one.holds for one in rounds)} of {len(rounds)}",
        measuring=summarise_rounds(
            [one.measured.total.control_seconds / one.measured.total.seconds for one in rounds]
        ),
    )
