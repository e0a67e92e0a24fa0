"""What `caption_corpus.py` and `answer_vqa.py` share: their command line and their end.

Without --input and --output they label an embedded corpus on an S3-speaking server they start
themselves, with the embedded model: a demonstration, and the shortest proof that all works here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import Kind, RunConfig
from cluster.console import open_console
from cluster.demo.local_s3 import LocalS3
from cluster.errors import RunError, UsageError
from cluster.logs import configure_logs
from cluster.report.terminal import print_report
from cluster.runs.run import run
from jobs.demo_results import keep_results
from jobs.make_corpus import make_corpus
from sppruner import Budget, PruneSpec
from sppruner.engine import SamplingParams
from sppruner.engine.interface import DTYPES
from sppruner.errors import SpecError
from sppruner.models.loading import EMBEDDED

_INTERRUPTED = 130  # as a shell reports a command that SIGINT ended
_DEMO_ROWS = 384
# So that the few rows of a demonstration still show several commits and control batches.
_DEMO_BOUNDS: dict[str, Any] = {"unit_rows": 64, "control_share": 0.25, "slots": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One command: its kind, its default prompt and how long answers may get."""

    kind: Kind
    prompt: str
    max_new_tokens: int
    about: str


def parser(job: Job) -> argparse.ArgumentParser:
    """The frozen command line (tests/jobs/test_labelling_cli.py)."""
    made = argparse.ArgumentParser(
        description=job.about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--input", help="corpus: Parquet or WebDataset under an s3:// or local path")
    made.add_argument("--output", help="empty prefix for the results, or that of a run to resume")
    made.add_argument("--model", default=EMBEDDED, help="folder or Hub name (%(default)s)")
    made.add_argument(
        "--method",
        default="sppruner",
        help="pruning method, as in sppruner or sppruner:relevance=none, or none (%(default)s)",
    )
    made.add_argument(
        "--retain", type=float, default=0.222, help="share of visual tokens kept (%(default)s)"
    )
    made.add_argument(
        "--auto",
        action="store_true",
        help="measure first whether pruning pays on these rows, and label densely where not",
    )
    made.add_argument("--prompt", default=job.prompt, help="(%(default)r)")
    made.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        default=job.max_new_tokens,
        help="longest answer (%(default)s)",
    )
    made.add_argument("--limit", type=int, help="only the first N rows")
    made.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the model; auto is bfloat16 on a GPU, float32 on a CPU (%(default)s)",
    )
    made.add_argument("--replicas", type=int, default=1, help="model replicas (%(default)s)")
    return made


def config_of(job: Job, arguments: argparse.Namespace, *, demo: bool) -> RunConfig:
    """The run the command line asks for. Raises UsageError."""
    try:
        spec = PruneSpec.parse(arguments.method, Budget(ratio=arguments.retain))
        generation = SamplingParams(max_new_tokens=arguments.max_new_tokens)
    except SpecError as error:
        raise UsageError(str(error)) from error
    return RunConfig(
        kind=job.kind,
        input=arguments.input,
        output=arguments.output,
        model=arguments.model,
        prompt=arguments.prompt,
        spec=spec,
        generation=generation,
        limit=arguments.limit,
        dtype=arguments.dtype,
        replicas=arguments.replicas,
        auto=arguments.auto,
        **(_DEMO_BOUNDS if demo else {}),
    )


def main(job: Job, argv: Sequence[str] | None) -> int:
    """The process boundary: every RunError becomes its message and its exit code."""
    configure_logs()
    arguments = parser(job).parse_args(argv)
    try:
        return _main(job, arguments)
    except RunError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped: what is committed stays; the same command resumes", file=sys.stderr)
        return _INTERRUPTED


def _main(job: Job, arguments: argparse.Namespace) -> int:
    if (arguments.input is None) != (arguments.output is None):
        raise UsageError("give both --input and --output, or neither for the embedded corpus")
    told = open_console(stderr=True)
    with ExitStack() as stack:
        demo = arguments.input is None
        environment: Mapping[str, str] = {}
        if demo:
            server = stack.enter_context(LocalS3("demo"))
            environment = server.environment
            arguments.input = f"{server.uri}/corpus"
            arguments.output = f"{server.uri}/labels"
            rows = min(_DEMO_ROWS, arguments.limit or _DEMO_ROWS)
            told.print(f"drawing {rows} scenes to {arguments.input}", highlight=False)
            make_corpus(kind=job.kind, rows=rows, seed=0, format="parquet", output=arguments.input)
        config = config_of(job, arguments, demo=demo)
        outcome = run(config, console=told, environment=environment)
        print_report(outcome.summary, note=outcome.note)
        if demo:
            kept = keep_results(job.kind, outcome.summary, Path("out"))
            print(kept)
        return outcome.exit_code
