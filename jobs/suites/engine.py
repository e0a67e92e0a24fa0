"""What pruned tokens buy end to end: the engines side by side, dense and pruned.

Every case answers the same requests, each about a drawn scene of its own, with a fixed number of
new tokens. Rounds go through all cases, every other one backwards; one more round before them is
not counted (but with --quick there is none). Columns of a case:

- batch_rows: requests side by side at most. For `generate best static batch` the fastest of a few,
  found in a trial before the rounds; for the continuous engine its slots.
- images_per_second: all requests, from the first submission to the last answer, pixels included.
- ttft_ms: one request alone, from its submission to its first token.
- inter_token_ms: the same request, from one token to the next.
- vision_ms, pruner_ms, prefill_ms, decode_ms, other_ms: where a pass of its own, with timers around
  the steps of an engine, spent its time, per image. vision: tower and projector, with the signals
  read on the way. pruner: relevance, schedules, selection, kept features. prefill, decode: forwards
  of prompts, and of one more token. other: the rest, such as pixels, positions, re-packing, copies
  into slots, and choosing tokens.
- peak_memory_mib: allocated on the GPU at most in that pass, weights included; empty on a CPU.
- kv_bytes: keys and values of one request in its last step, with the padding of its batch.

Speeds are medians over the rounds with their smallest and largest value, and ratios of them are
taken round by round. `pruner_share` is the pruner's part of a pass with timers, of which this one
case has as many as there are rounds. Images are encoded anew in every pass.

With a peer, vLLM answers the same requests in every round, in a process of its own that sleeps
while ours runs (`jobs/suites/peer.py`). Its columns are those that can be timed from outside;
`peer_equal_answers` is the share of requests to which it says the tokens that our engine says
densely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.console import Console

from cluster.errors import UsageError
from jobs.suites.passes import Timed, Way, best_rows, in_turns, spoken, timed_pass
from jobs.suites.peer import NAME as PEER
from jobs.suites.peer import Peer, opened
from jobs.suites.phases import Phase, Trace
from jobs.suites.random_models import build
from jobs.suites.result import machine
from jobs.suites.result import ratio as spread
from jobs.suites.shapes import Shape, scenes
from sppruner import Budget, PruneSpec
from sppruner.engine import Request, SamplingParams
from sppruner.errors import SpecError
from sppruner.models.loading import LoadedModel
from sppruner.selectors import selector_for

METHODS: Final = ("sppruner", "fsr", "prunesid", "visionzip", "random")
_RATIOS: Final = (0.333, 0.222, 0.111)
_HEADLINE: Final = "sppruner", 0.222
_NEW_TOKENS: Final = 8
_PROMPT: Final = "what is the shape of the red object"
_STATIC: Final = "generate best static batch"
_DENSE: Final = "engine dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """See the module for what each column covers."""

    case: str
    batch_rows: int
    images_per_second: dict[str, float]
    ttft_ms: dict[str, float]
    inter_token_ms: dict[str, float]
    vision_ms: float | None
    pruner_ms: float | None
    prefill_ms: float | None
    decode_ms: float | None
    other_ms: float | None
    peak_memory_mib: float | None
    kv_bytes: int | None


def engine(
    shape: Shape,
    *,
    methods: Sequence[str] = METHODS,
    dtype: str = "auto",
    quick: bool,
    told: Console,
    peer: Path | None = None,
) -> dict[str, Any]:
    """methods: those to time at every budget, beside the headline's; with `quick` it alone. dtype:
    of the model. peer: the Python of an environment with vLLM, whose side is then timed too. Raises
    UsageError for a shape that this machine cannot run, and as `peer.opened` and `Peer.answer`
    do."""
    for method in methods:
        try:
            selector_for(PruneSpec.parse(method, Budget(ratio=_HEADLINE[1])))
        except SpecError as error:
            raise UsageError(f"--methods: {error}") from error
    about = machine()
    loaded = build(shape, dtype)
    count, rounds = (shape.quick_images, 2) if quick else (shape.images, 5)
    generation = SamplingParams(max_new_tokens=_NEW_TOKENS)
    *requests, alone = [
        Request(id=str(number), prompt=_PROMPT, images=(image,), generation=generation)
        for number, image in enumerate(scenes(shape, count + 1))
    ]
    slots = min(shape.rows, count)
    with ExitStack() as stack:
        other = None
        if peer is not None:
            told.print(f"{PEER} starts", highlight=False)
            other = stack.enter_context(opened(peer, loaded, [*requests, alone], slots=slots))
        best = best_rows(loaded, requests[:slots])
        told.print(f"{shape.name}: {count} images, static batches of {best}", highlight=False)
        ways = _ways(best, slots, [] if quick else methods)
        if other is not None:
            equal = _equal_answers(other, loaded, ways, requests)
            about |= {"peer": other.about, "peer_equal_answers": equal}
        timed = in_turns(
            loaded,
            ways,
            requests,
            alone,
            rounds=rounds,
            uncounted=int(not quick),
            told=told,
            others={} if other is None else {PEER: other.timed},
        )
    cases = []
    shares = []
    for way in ways:
        told.print(f"timers in {way.name}", highlight=False)
        repeats = rounds if way.name == _pruned(*_HEADLINE) else 1
        passes = [timed_pass(loaded, way, requests) for _ in range(repeats)]
        if way.name == _pruned(*_HEADLINE):
            shares = [trace.seconds["pruner"] / trace.total for trace, _ in passes]
        cases.append(_case(way.name, way.rows, timed, passes, images=count))
    if other is not None:
        cases.append(_case(PEER, slots, timed, [], images=count))

    def paired(above: str, below: str) -> dict[str, float]:
        speeds = [(row[above].images_per_second, row[below].images_per_second) for row in timed]
        return spread([a / b for a, b in speeds])

    ratios = {
        "engine_dense_vs_static_batch": paired(_DENSE, _STATIC),
        "engine_pruned_vs_dense": paired(_pruned(*_HEADLINE), _DENSE),
        "pruner_share": spread(shares),
    }
    if other is not None:
        ratios |= {
            "engine_dense_vs_peer": paired(_DENSE, PEER),
            "engine_pruned_vs_peer": paired(_pruned(*_HEADLINE), PEER),
        }
    return {
        "suite": "engine",
        "machine": about
        | {
            "shape": shape.name,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "images": count,
            "rounds": rounds,
        },
        "cases": [asdict(case) for case in cases],
        "ratios": ratios,
    }


def _pruned(method: str, ratio: float) -> str:
    return f"engine {method} {100 * ratio:.1f} %"


def _ways(best: int, slots: int, methods: Sequence[str]) -> list[Way]:
    pruned = [_HEADLINE, *((method, ratio) for method in methods for ratio in _RATIOS)]
    return [
        Way(name="generate batch 1", rows=1),
        Way(name=_STATIC, rows=best),
        Way(name=_DENSE, rows=slots, continuous=True),
        *(
            Way(
                name=_pruned(method, ratio),
                rows=slots,
                continuous=True,
                spec=PruneSpec.parse(method, Budget(ratio=ratio)),
            )
            for method, ratio in dict.fromkeys(pruned)
        ),
    ]


def _equal_answers(
    other: Peer, loaded: LoadedModel, ways: Sequence[Way], requests: Sequence[Request]
) -> float:
    """The share of requests that the peer answers with the tokens of our engine, densely."""
    (dense,) = (way for way in ways if way.name == _DENSE)
    pairs = zip(other.answer().tokens, spoken(loaded, dense, requests), strict=True)
    return sum(theirs == ours for theirs, ours in pairs) / len(requests)


def _case(
    name: str,
    rows: int,
    timed: Sequence[Mapping[str, Timed]],
    passes: Sequence[tuple[Trace, float | None]],
    *,
    images: int,
) -> Case:
    """timed: of all cases, by round. passes: those with timers, if there were any."""

    def per_image(phase: Phase) -> float | None:
        seconds = [trace.seconds[phase] for trace, _ in passes]
        return 1e3 * median(seconds) / images if seconds else None

    rounds = [found[name] for found in timed]
    trace, memory = passes[-1] if passes else (None, None)
    return Case(
        case=name,
        batch_rows=rows,
        images_per_second=spread([one.images_per_second for one in rounds]),
        ttft_ms=spread([1e3 * one.first_token for one in rounds]),
        inter_token_ms=spread([1e3 * one.between_tokens for one in rounds]),
        vision_ms=per_image("vision"),
        pruner_ms=per_image("pruner"),
        prefill_ms=per_image("prefill"),
        decode_ms=per_image("decode"),
        other_ms=per_image("other"),
        peak_memory_mib=memory,
        kv_bytes=None if trace is None else trace.kv_bytes,
    )
