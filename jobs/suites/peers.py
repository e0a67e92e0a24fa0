"""Suite `peers`: what else could label these images, on the same images, model and machine.

Bare engines first: vLLM as its package has it (`vLLM dense`), vLLM with this project's plugin at
three budgets, and this project's engine at the same. All answer the same images in turn, every
second round in reverse order, after a round that checks that they do the same work: prompts of the
same lengths, and answers of the same number of tokens. Then whole corpora, from Parquet to Parquet,
each labelled by commands of their own (`jobs/suites/corpus_peers.py`): Ray Data LLM dense, as its
users have it; Ray Data LLM with this project's plugin; and this project's job with `--engine vllm`,
which commits every row once. Beside them the plugin alone, fed from memory. Columns:

- images: of one round.
- images_per_second: bare engines, from the first submission to the last answer; corpora, from the
  first row at the engine (the job: from its first rows read) to the last file. What they take to
  start is in neither.
- equal_answers: share of the checked answers whose text is that of this project's engine; in half
  precision near ties end differently.

Ratios are taken round by round, those of the job with 22.2 %: `job_vs_ray_data_llm` is to Ray Data
LLM as its users have it, dense; `job_vs_ray_data_llm_pruned` to it with the plugin. Nobody has a
cache: every image is encoded and prefilled.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from PIL import Image
from rich.console import Console

from cluster.errors import FleetUnavailable, UsageError
from cluster.serving.engine_settings import default_slots
from jobs.suites.corpora import draw_squares, write_corpus
from jobs.suites.corpus_peers import Labelled, label_by_job, label_by_ray_data_llm
from jobs.suites.peer import Peer, start_peer
from jobs.suites.peer_inputs import PeerInputs, written_inputs
from jobs.suites.random_models import build
from jobs.suites.result import alternate, describe_machine, summarise_rounds
from jobs.suites.shapes import ModelShape
from sppruner.engine import ContinuousEngine, Request, Result, SamplingParams
from sppruner.errors import EngineError
from sppruner.models.loading import LoadedModel
from sppruner.spec import DENSE, Budget, PruneSpec
from sppruner.tiny.questions import CAPTION_PROMPT

_NEW_TOKENS: Final = 8
_PRUNED: Final = tuple(
    PruneSpec(method="sppruner", budget=Budget(ratio=ratio)) for ratio in (0.333, 0.222, 0.111)
)
_HEADLINE: Final = _PRUNED[1]
_FILE_ROWS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersCase:
    """One participant over all rounds; the module docstring defines the columns."""

    case: str
    images: int
    images_per_second: dict[str, float]
    equal_answers: float | None


def run_peers_suite(
    shape: ModelShape,
    *,
    dtype: str = "auto",
    quick: bool,
    console: Console,
    peer: Path | None = None,
) -> dict[str, Any]:
    """Runs the suite.

    dtype: model precision. peer: Python of an environment with vLLM, this project and Ray; None for
    the one that runs this. Raises UsageError where it is none, or for a shape that this machine
    cannot run, and FleetUnavailable where a participant fails or does other work than the others.
    """
    if peer is None and importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "suite peers needs vLLM: make .venv-vllm/.ready, and --peer .venv-vllm/bin/python"
        )
    python = peer or Path(sys.executable)
    machine = describe_machine()
    loaded = build(shape, dtype)
    gpu = loaded.model.device.type == "cuda"
    images = shape.quick_images if quick else shape.images
    rows = images * (8 if quick else 16)
    drawn = draw_squares(rows + 1, 0, shape.side)
    requests = [
        Request(
            id=row.key,
            prompt=CAPTION_PROMPT,
            images=(Image.open(io.BytesIO(row.image or b"")).convert("RGB"),),
            generation=SamplingParams(max_new_tokens=_NEW_TOKENS),
        )
        for row in drawn
    ]
    slots = default_slots(gpu=gpu)
    with ExitStack() as stack:
        inputs = stack.enter_context(written_inputs(loaded, requests, slots=slots))
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="corpora-")))
        write_corpus(str(folder / "corpus"), drawn[:rows], _FILE_ROWS)
        console.print("vLLM with the plugin starts", highlight=False)
        plugin = stack.enter_context(start_peer(python, inputs, plugin=True))
        bare, equal = _time_engines(
            python, inputs, plugin, loaded, requests[:images], rounds=2 if quick else 5,
            slots=slots, console=console,
        )  # fmt: skip
        corpora = _time_corpora(
            python, inputs, plugin, folder, rows, rounds=1 if quick else 2, gpu=gpu,
            console=console,
        )  # fmt: skip
    cases = [
        PeersCase(
            case=name,
            images=count,
            images_per_second=summarise_rounds([round[name] for round in rounds]),
            equal_answers=equal.get(name),
        )
        for rounds, count in ((bare, images), (corpora, rows))
        for name in rounds[0]
    ]
    return {
        "suite": "peers",
        "machine": machine
        | {
            "shape": shape.name,
            "dtype": inputs.settings["dtype"],
            "peer": plugin.about,
            "slots": slots,
            "new_tokens": _NEW_TOKENS,
            "rounds": f"{len(bare)} of bare engines, {len(corpora)} of corpora",
        },
        "cases": [asdict(case) for case in cases],
        "ratios": _ratios(bare, corpora),
    }


def _name(who: str, spec: PruneSpec) -> str:
    return f"{who} dense" if spec.is_dense else f"{who} {100 * (spec.budget.ratio or 0):.1f} %"


def _ratios(
    bare: Sequence[Mapping[str, float]], corpora: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    pairs = {
        "vllm_pruned_vs_vllm_dense": (bare, _name("vLLM", _HEADLINE), "vLLM dense"),
        "engine_dense_vs_vllm_dense": (bare, "engine dense", "vLLM dense"),
        "engine_pruned_vs_vllm_pruned": (
            bare,
            _name("engine", _HEADLINE),
            _name("vLLM", _HEADLINE),
        ),
        "job_vs_ray_data_llm": (corpora, _name("job", _HEADLINE), "Ray Data LLM dense"),
        "job_vs_ray_data_llm_pruned": (
            corpora,
            _name("job", _HEADLINE),
            _name("Ray Data LLM", _HEADLINE),
        ),
        "job_vs_bare_vllm": (corpora, _name("job", _HEADLINE), _name("from memory", _HEADLINE)),
    }
    return {
        ratio: summarise_rounds([round[above] / round[below] for round in rounds])
        for ratio, (rounds, above, below) in pairs.items()
    }


def _time_engines(
    python: Path,
    inputs: PeerInputs,
    plugin: Peer,
    loaded: LoadedModel,
    requests: Sequence[Request],
    *,
    rounds: int,
    slots: int,
    console: Console,
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Images per second by name, a mapping per round; and the share of equal answers by name."""
    count = len(requests)
    specs = (DENSE, *_PRUNED)
    with ExitStack() as stack:
        console.print("vLLM without it starts", highlight=False)
        stock = stack.enter_context(start_peer(python, inputs))
        # The same images recur in every round: without an encoder cache each is encoded every time.
        engine = stack.enter_context(closing(ContinuousEngine(loaded, slots=slots, cache_bytes=0)))
        peers = {spec: stock if spec.is_dense else plugin for spec in specs}
        equal = {}
        for spec in specs:
            console.print(f"comparing {_name('answers,', spec)}", highlight=False)
            equal[_name("vLLM", spec)] = _compare(
                peers[spec], _answer(engine, requests, spec), loaded, spec
            )
        turns: dict[str, Callable[[], float]] = {}
        for spec in specs:
            turns[_name("vLLM", spec)] = partial(_peer_seconds, peers[spec], spec, count)
        for spec in specs:
            turns[_name("engine", spec)] = partial(_engine_seconds, engine, requests, spec)
        return _time_turns(turns, count, rounds, console), equal


def _time_corpora(
    python: Path,
    inputs: PeerInputs,
    plugin: Peer,
    folder: Path,
    rows: int,
    *,
    rounds: int,
    gpu: bool,
    console: Console,
) -> list[dict[str, float]]:
    """Rows per second by name, a mapping per round."""
    numbers = iter(range(sys.maxsize))

    def seconds(label: Callable[..., Labelled], spec: PruneSpec, **more: Any) -> float:
        found = label(
            python, inputs, folder / "corpus", folder / f"labels-{next(numbers)}",
            prompt=CAPTION_PROMPT, spec=spec, **more,
        )  # fmt: skip
        _check(label.__name__, found, lengths[spec])
        return found.seconds

    lengths = {
        DENSE: sorted(map(len, inputs.prompts[:rows])),
        _HEADLINE: sorted(plugin.answer(_HEADLINE).prompt_tokens),
    }
    by_ray = partial(seconds, label_by_ray_data_llm, gpu=gpu)
    turns: dict[str, Callable[[], float]] = {
        _name("from memory", _HEADLINE): partial(_peer_seconds, plugin, _HEADLINE, rows),
        _name("job", _HEADLINE): partial(seconds, label_by_job, _HEADLINE),
        _name("Ray Data LLM", _HEADLINE): partial(by_ray, _HEADLINE),
        "Ray Data LLM dense": partial(by_ray, DENSE),
    }
    return _time_turns(turns, rows, rounds, console)


def _time_turns(
    turns: Mapping[str, Callable[[], float]], count: int, rounds: int, console: Console
) -> list[dict[str, float]]:
    """count: images of a turn. Rates by name, a mapping per round."""
    timed = []
    for number in range(rounds):
        rates = {}
        for name in alternate(list(turns), number):
            rates[name] = count / turns[name]()
            console.print(
                f"round {number + 1} of {rounds}: {name} {rates[name]:.3g} images/s",
                highlight=False,
            )
        timed.append({name: rates[name] for name in turns})
    return timed


def _peer_seconds(peer: Peer, spec: PruneSpec, count: int) -> float:
    return peer.answer(spec, first=count).seconds


def _engine_seconds(
    engine: ContinuousEngine, requests: Sequence[Request], spec: PruneSpec
) -> float:
    started = time.perf_counter()
    _answer(engine, requests, spec)
    return time.perf_counter() - started


def _answer(engine: ContinuousEngine, requests: Sequence[Request], spec: PruneSpec) -> list[Result]:
    """Raises EngineError if an answer failed or is shorter than the others'."""
    results = engine.run([replace(request, spec=spec) for request in requests])
    for result in results:
        if result.error_code is not None or result.completion_tokens != _NEW_TOKENS:
            raise EngineError(
                f"{result.id}: {result.error_message or f'{result.completion_tokens} tokens'}"
            )
    return results


def _compare(peer: Peer, ours: Sequence[Result], loaded: LoadedModel, spec: PruneSpec) -> float:
    """Share of equal answers. Raises FleetUnavailable where prompts are of other lengths."""
    theirs = peer.answer(spec, first=len(ours))
    expected = [result.prompt_tokens for result in ours]
    if theirs.prompt_tokens != expected:
        raise FleetUnavailable(
            f"vLLM, {spec.method}: prompts of {theirs.prompt_tokens} tokens, and ours have "
            f"{expected}: it does other work"
        )
    decode = partial(loaded.processor.tokenizer.decode, skip_special_tokens=True)
    pairs = zip(theirs.tokens, ours, strict=True)
    return sum(decode(tokens).strip() == result.text for tokens, result in pairs) / len(ours)


def _check(who: str, found: Labelled, prompt_tokens: Sequence[int]) -> None:
    """Raises FleetUnavailable where rows are missing or other work was done."""
    if found.prompt_tokens != prompt_tokens or {*found.new_tokens} != {_NEW_TOKENS}:
        raise FleetUnavailable(
            f"{who}: {len(found.prompt_tokens)} rows of {sum(found.prompt_tokens)} prompt tokens "
            f"and {sum(found.new_tokens)} new ones instead of {len(prompt_tokens)} of "
            f"{sum(prompt_tokens)} and {_NEW_TOKENS * len(prompt_tokens)}"
        )
