"""The command line of the labelling jobs, `caption_corpus.py` and `answer_vqa.py`, and their exit
codes.

Without --input and --output they start a local S3 server and label a drawn corpus on it with the
embedded model: a demonstration, and the quickest check of an installation.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from cluster.config import MAX_ERROR_SHARE, CorpusFormat, Kind, RunConfig
from cluster.console import open_console
from cluster.errors import UsageError
from cluster.serving.engine_settings import VLLM, parse_options
from jobs.boundary import flush_stdout, run_command
from sppruner import Budget, PruneSpec
from sppruner.engine import SamplingParams
from sppruner.engine.interface import DTYPES
from sppruner.errors import SpecError
from sppruner.tiny import EMBEDDED

_DEMO_ROWS = 384
_DEMO_RESULTS = Path("out")
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a submitted job
# Small units: the few rows of a demonstration still take several commits.
_DEMO_BOUNDS: dict[str, Any] = {"unit_rows": 64, "slots": 16}
# Of a demonstration, whose rows are too few to be measured within the stated cost.
_DEMO_BLOCKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What distinguishes one labelling command from another."""

    kind: Kind
    """Task of the run."""
    prompt: str
    """Default of --prompt."""
    max_new_tokens: int
    """Default of --max-new-tokens."""
    about: str
    """Description that --help prints."""


def build_parser(job: Job) -> argparse.ArgumentParser:
    """The command line, frozen by tests/jobs/test_labelling_cli.py."""
    parser = argparse.ArgumentParser(
        description=job.about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", help="corpus: Parquet or WebDataset, s3://bucket/prefix or a local path"
    )
    parser.add_argument("--output", help="prefix for the results: empty, or of a run to resume")
    parser.add_argument("--model", default=EMBEDDED, help="folder or Hub name (%(default)s)")
    parser.add_argument(
        "--method",
        default="sppruner",
        help="pruning method, e.g. sppruner or sppruner:relevance=none, or none (%(default)s)",
    )
    parser.add_argument(
        "--retain", type=float, default=0.222, help="share of visual tokens kept (%(default)s)"
    )
    parser.add_argument(
        "--auto",
        action="store_true",
        help="measure first whether pruning is faster on these rows; label densely if it is not",
    )
    parser.add_argument(
        "--image-column",
        metavar="COLUMN",
        help="Parquet: where images are, if names do not say",
    )
    parser.add_argument(
        "--key", metavar="COLUMN", help="Parquet: what identifies a row, if names do not say"
    )
    if job.kind == "vqa":
        parser.add_argument(
            "--question-column", metavar="COLUMN", help="Parquet: where the questions are"
        )
    parser.add_argument("--prompt", default=job.prompt, help="prompt of every row (%(default)r)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        default=job.max_new_tokens,
        help="most tokens of an answer (%(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=get_args(CorpusFormat),
        help="which files of --input are the corpus, where there are both",
    )
    parser.add_argument(
        "--dotted-keys",
        action="store_true",
        help="WebDataset: keys end at the last dot of the file name, not at the first",
    )
    parser.add_argument("--limit", type=int, help="only the first N rows")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="model precision; auto is bfloat16 on a GPU, float32 on a CPU (%(default)s)",
    )
    parser.add_argument(
        "--engine",
        choices=("vllm",),
        help="drive vLLM, which must be installed (default: this project's own engine)",
    )
    parser.add_argument(
        "--engine-option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an argument of vLLM, such as tensor_parallel_size=2; repeatable",
    )
    parser.add_argument("--replicas", type=int, default=1, help="model replicas (%(default)s)")
    parser.add_argument(
        "--control-blocks",
        type=int,
        metavar="N",
        help="measure the saving on N blocks of rows that are answered densely too, 0 for none "
        "(default: as many as a half-width of 10 %% takes, for at most 5 %% of the run's seconds)",
    )
    parser.add_argument(
        "--max-error-share",
        type=float,
        metavar="SHARE",
        default=MAX_ERROR_SHARE,
        help="stop once a larger share of the rows failed; 1 never stops (%(default)s)",
    )
    parser.add_argument(
        "--retry-errors",
        metavar="CODES",
        nargs="?",
        const="",
        help="label failed rows of a run again, nothing else; with codes, comma-separated, only "
        "those (default: all that may succeed over an unchanged corpus)",
    )
    return parser


def build_config(job: Job, arguments: argparse.Namespace, *, demo: bool) -> RunConfig:
    """The run configuration of a command line. Raises UsageError."""
    if job.kind == "vqa" and "{question}" not in arguments.prompt:
        raise UsageError(
            f"--prompt {arguments.prompt!r} would leave out the row's question: write {{question}} "
            "where it belongs"
        )
    try:
        spec = PruneSpec.parse(arguments.method, Budget(ratio=arguments.retain))
        generation = SamplingParams(max_new_tokens=arguments.max_new_tokens)
    except SpecError as error:
        raise UsageError(str(error)) from error
    if arguments.engine_option and arguments.engine is None:
        raise UsageError("--engine-option goes with --engine vllm")
    blocks = arguments.control_blocks
    if blocks and spec.is_dense:
        raise UsageError(
            f"--control-blocks {blocks}: a dense run has nothing to compare; leave it out, or name "
            "a --method"
        )
    return RunConfig(
        kind=job.kind,
        input=arguments.input,
        output=arguments.output,
        model=arguments.model,
        prompt=arguments.prompt,
        spec=spec,
        generation=generation,
        limit=arguments.limit,
        format=arguments.format,
        dotted_keys=arguments.dotted_keys,
        image_column=arguments.image_column,
        key_column=arguments.key,
        question_column=getattr(arguments, "question_column", None),
        engine=VLLM if arguments.engine == "vllm" else None,
        engine_options=parse_options(arguments.engine_option),
        dtype=arguments.dtype,
        replicas=arguments.replicas,
        auto=arguments.auto,
        control_blocks=_DEMO_BLOCKS if demo and blocks is None else blocks,
        max_error_share=arguments.max_error_share,
        **(_DEMO_BOUNDS if demo else {}),
    )


def main(job: Job, argv: Sequence[str] | None) -> int:
    """Carries out the command; its exit code."""
    arguments = build_parser(job).parse_args(argv)
    left = "committed units stay; the same command resumes"
    return run_command(lambda: _run_job(job, arguments), argv, left=left)


def _run_job(job: Job, arguments: argparse.Namespace) -> int:
    if (arguments.input is None) != (arguments.output is None):
        raise UsageError("give both --input and --output, or neither for the embedded corpus")
    for name in ("input", "output"):
        _check_place(f"--{name}", getattr(arguments, name))
    if arguments.retry_errors is not None and arguments.output is None:
        raise UsageError("--retry-errors goes with --output: give the run to mend")
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"--limit {arguments.limit}: give at least 1")
    # Imported here, where Ctrl-C is handled: Ray, torch and transformers take many seconds.
    from cluster.demo.local_s3 import LocalS3
    from cluster.output.failed_rows import ErrorChoice
    from cluster.report.terminal import print_report
    from cluster.runs.run import run
    from jobs.demo_results import check_folder, copy_results
    from jobs.make_corpus import make_corpus

    stderr = open_console(stderr=True)
    with ExitStack() as stack:
        demo = arguments.input is None
        environment: Mapping[str, str] = {}
        if demo:
            check_folder(job.kind, _DEMO_RESULTS)
            server = stack.enter_context(LocalS3("demo"))
            environment = server.environment
            arguments.input = f"{server.uri}/corpus"
            arguments.output = f"{server.uri}/labels"
            rows = min(_DEMO_ROWS, arguments.limit or _DEMO_ROWS)
            stderr.print(f"drawing {rows} scenes to {arguments.input}", highlight=False)
            make_corpus(kind=job.kind, rows=rows, seed=0, format="parquet", output=arguments.input)
        config = build_config(job, arguments, demo=demo)
        choice = arguments.retry_errors
        retry = None if choice is None else ErrorChoice.parse(choice)
        outcome = run(config, console=stderr, environment=environment, retry=retry)
        with report_shown(config.output):
            print_report(outcome.summary, note=outcome.note)
            if demo:
                print(copy_results(job.kind, outcome.summary, _DEMO_RESULTS))
        return outcome.exit_code


def _check_place(option: str, place: str | None) -> None:
    """Raises UsageError for a relative path where Ray runs this as a submitted job: in a folder of
    its own, which is removed with the job."""
    if place is None or "://" in place or os.path.isabs(place):
        return
    if _SUBMITTED in os.environ:
        raise UsageError(
            f"{option} {place}: a submitted job runs in a temporary folder of the cluster; give "
            "s3://bucket/prefix or an absolute path that every node has mounted"
        )


@contextmanager
def report_shown(output: str) -> Iterator[None]:
    """Within it a report is shown. The rows are committed: what fails here fails no run."""
    try:
        yield
        flush_stdout()
    except Exception as error:
        print(
            f"the run has ended, but its report cannot be shown ({type(error).__name__}: "
            f"{error}): python jobs/report.py {output}",
            file=sys.stderr,
        )
