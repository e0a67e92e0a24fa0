"""Suite `engine`: engines side by side, dense and pruned, end to end.

Every case answers the same requests, each about its own drawn scene, with a fixed number of new
tokens. Rounds visit all cases, every second round in reverse order, after one warm-up round (none
with --quick). Columns of a case:

- batch_rows: most requests side by side. `generate best static batch` uses the fastest of a few
  sizes, found in a trial before the rounds; the continuous engine uses its slots.
- images_per_second: all requests, from the first submission to the last answer, preprocessing
  included.
- ttft_ms: a single request with nothing else in the engine, from submission to first token.
- inter_token_ms: the same request, mean time between tokens.
- vision_ms, pruner_ms, prefill_ms, decode_ms, other_ms: time per image in a separate pass with
  timers around the engine's steps. vision: tower and projector, including the signals they yield.
  pruner: relevance, schedules, selection, kept features. prefill, decode: forward passes of prompts
  and of single tokens. other: the rest, such as preprocessing, positions, re-packing, copies into
  slots, and sampling.
- peak_memory_mib: peak memory allocated on the GPU in that pass, weights included; empty on a CPU.
- kv_bytes: KV cache of one request at its last step, including the padding of its batch.

Speeds are medians over the rounds with their smallest and largest value; ratios are taken round by
round. `pruner_share` is the pruner's share of a pass with timers; its case has one such pass per
round. Every pass encodes every image.

With a peer, vLLM answers the same requests in every round, in its own process, which sleeps while
ours runs (`jobs/suites/peer.py`). It has the columns that can be timed from outside;
`peer_equal_answers` is the share of requests for which it generates the same tokens as our dense
engine.
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
from jobs.suites.passes import (
    EngineMode,
    EngineTiming,
    find_best_batch,
    generate_tokens,
    time_pass_phases,
    time_rounds,
)
from jobs.suites.peer import NAME as PEER
from jobs.suites.peer import Peer, open_peer
from jobs.suites.phases import Phase, PhaseTimes
from jobs.suites.random_models import build
from jobs.suites.result import describe_machine, summarise_rounds
from jobs.suites.shapes import ModelShape, draw_scenes
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
class EngineCase:
    """One mode over all rounds; the module docstring defines the columns."""

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


def run_engine_suite(
    shape: ModelShape,
    *,
    methods: Sequence[str] = METHODS,
    dtype: str = "auto",
    quick: bool,
    console: Console,
    peer: Path | None = None,
) -> dict[str, Any]:
    """Runs the suite.

    methods: methods to time at every budget, besides the headline's; `quick` times the headline
    only. dtype: model precision. peer: Python of an environment with vLLM to time as well. Raises
    UsageError for a shape that this machine cannot run, and as `open_peer` and `Peer.answer` do.
    """
    for method in methods:
        try:
            spec = PruneSpec.parse(method, Budget(ratio=_HEADLINE[1]))
            selector_for(spec)
        except SpecError as error:
            raise UsageError(f"--methods: {error}") from error
        if spec.is_dense:
            raise UsageError("--methods: none is timed always, leave it out")
    machine = describe_machine()
    loaded = build(shape, dtype)
    count, rounds = (shape.quick_images, 2) if quick else (shape.images, 5)
    generation = SamplingParams(max_new_tokens=_NEW_TOKENS)
    *requests, single = [
        Request(id=str(number), prompt=_PROMPT, images=(image,), generation=generation)
        for number, image in enumerate(draw_scenes(shape, count + 1))
    ]
    slots = min(shape.rows, count)
    with ExitStack() as stack:
        peer_server = None
        if peer is not None:
            console.print(f"{PEER} starts", highlight=False)
            peer_server = stack.enter_context(
                open_peer(peer, loaded, [*requests, single], slots=slots)
            )
        best_batch = find_best_batch(loaded, requests[:slots])
        console.print(
            f"{shape.name}: {count} images, static batches of {best_batch}", highlight=False
        )
        modes = _list_modes(best_batch, slots, [] if quick else methods)
        if peer_server is not None:
            equal = _compare_answers(peer_server, loaded, modes, requests)
            machine |= {"peer": peer_server.about, "peer_equal_answers": equal}
        timings = time_rounds(
            loaded,
            modes,
            requests,
            single,
            rounds=rounds,
            warmup_rounds=int(not quick),
            console=console,
            others={} if peer_server is None else {PEER: peer_server.time_round},
        )
    cases = []
    shares = []
    for mode in modes:
        console.print(f"timers in {mode.name}", highlight=False)
        repeats = rounds if mode.name == _name_pruned(*_HEADLINE) else 1
        passes = [time_pass_phases(loaded, mode, requests) for _ in range(repeats)]
        if mode.name == _name_pruned(*_HEADLINE):
            shares = [times.seconds["pruner"] / times.total for times, _ in passes]
        cases.append(_make_case(mode.name, mode.rows, timings, passes, images=count))
    if peer_server is not None:
        cases.append(_make_case(PEER, slots, timings, [], images=count))

    def compare_rounds(above: str, below: str) -> dict[str, float]:
        speeds = [(row[above].images_per_second, row[below].images_per_second) for row in timings]
        return summarise_rounds([a / b for a, b in speeds])

    ratios = {
        "engine_dense_vs_static_batch": compare_rounds(_DENSE, _STATIC),
        "engine_pruned_vs_dense": compare_rounds(_name_pruned(*_HEADLINE), _DENSE),
        "pruner_share": summarise_rounds(shares),
    }
    if peer_server is not None:
        ratios |= {
            "engine_dense_vs_peer": compare_rounds(_DENSE, PEER),
            "engine_pruned_vs_peer": compare_rounds(_name_pruned(*_HEADLINE), PEER),
        }
    return {
        "suite": "engine",
        "machine": machine
        | {
            "shape": shape.name,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "images": count,
            "rounds": rounds,
        },
        "cases": [asdict(case) for case in cases],
        "ratios": ratios,
    }


def _name_pruned(method: str, ratio: float) -> str:
    return f"engine {method} {100 * ratio:.1f} %"


def _list_modes(best_batch: int, slots: int, methods: Sequence[str]) -> list[EngineMode]:
    pruned = [_HEADLINE, *((method, ratio) for method in methods for ratio in _RATIOS)]
    return [
        EngineMode(name="generate batch 1", rows=1),
        EngineMode(name=_STATIC, rows=best_batch),
        EngineMode(name=_DENSE, rows=slots, continuous=True),
        *(
            EngineMode(
                name=_name_pruned(method, ratio),
                rows=slots,
                continuous=True,
                spec=PruneSpec.parse(method, Budget(ratio=ratio)),
            )
            for method, ratio in dict.fromkeys(pruned)
        ),
    ]


def _compare_answers(
    peer_server: Peer, loaded: LoadedModel, modes: Sequence[EngineMode], requests: Sequence[Request]
) -> float:
    """Share of requests for which the peer generates the tokens of our dense engine."""
    (dense,) = (mode for mode in modes if mode.name == _DENSE)
    pairs = zip(peer_server.answer().tokens, generate_tokens(loaded, dense, requests), strict=True)
    return sum(theirs == ours for theirs, ours in pairs) / len(requests)


def _make_case(
    name: str,
    rows: int,
    timings: Sequence[Mapping[str, EngineTiming]],
    passes: Sequence[tuple[PhaseTimes, float | None]],
    *,
    images: int,
) -> EngineCase:
    """timings: of all cases, by round. passes: passes with phase timers; empty for a peer."""

    def per_image(phase: Phase) -> float | None:
        seconds = [times.seconds[phase] for times, _ in passes]
        return 1e3 * median(seconds) / images if seconds else None

    rounds = [found[name] for found in timings]
    times, memory = passes[-1] if passes else (None, None)
    return EngineCase(
        case=name,
        batch_rows=rows,
        images_per_second=summarise_rounds([one.images_per_second for one in rounds]),
        ttft_ms=summarise_rounds([1e3 * one.first_token for one in rounds]),
        inter_token_ms=summarise_rounds([1e3 * one.inter_token for one in rounds]),
        vision_ms=per_image("vision"),
        pruner_ms=per_image("pruner"),
        prefill_ms=per_image("prefill"),
        decode_ms=per_image("decode"),
        other_ms=per_image("other"),
        peak_memory_mib=memory,
        kv_bytes=None if times is None else times.kv_bytes,
    )
