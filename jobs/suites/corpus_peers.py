"""A corpus on disk, labelled by commands that a user would run: this project's job with vLLM
inside, and Ray Data LLM. Each starts a Ray cluster and an engine of its own and ends them.

Seconds run from the first row that reaches Ray Data LLM's engine, or from the job's first rows that
are read, to the last file: clusters, engines and actors start before. By then the job's replica has
answered two rows of no corpus, Ray Data LLM's engine none.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from cluster.errors import FleetUnavailable
from cluster.output.run_output import RunOutput
from jobs.suites.peer import peer_environment
from jobs.suites.peer_inputs import PeerInputs
from sppruner.spec import PruneSpec

_REPOSITORY: Final = Path(__file__).parents[2]
_RAY_DATA_LLM: Final = Path(__file__).with_name("ray_data_llm.py")
_LOG_LINES: Final = 15
# What the job's engine has of its own, or says by other options.
_NOT_OPTIONS: Final = frozenset(
    {"dtype", "max_num_seqs", "mm_processor_cache_gb", "generation_config", "limit_mm_per_prompt"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A corpus that one of them labelled."""

    seconds: float
    prompt_tokens: list[int]
    """Of every row, in ascending order."""
    new_tokens: list[int]
    """Of every row, in ascending order."""


def label_by_job(
    python: Path, inputs: PeerInputs, corpus: Path, output: Path, *, prompt: str, spec: PruneSpec
) -> Labelled:
    """The job, in the environment of `python`; nothing is measured while it runs. Raises
    FleetUnavailable with the end of its log."""
    options = {n: v for n, v in inputs.settings.items() if n not in _NOT_OPTIONS}
    command = [
        str(python), "jobs/caption_corpus.py", "--engine", "vllm",
        "--input", str(corpus), "--output", str(output), "--model", str(inputs.model),
        "--dtype", inputs.settings["dtype"], "--prompt", prompt,
        "--max-new-tokens", str(inputs.new_tokens), "--method", spec.method,
        "--retain", str(spec.budget.ratio), "--control-blocks", "0",
    ]  # fmt: skip
    for name, value in options.items():
        command += ["--engine-option", f"{name}={json.dumps(value)}"]
    said = _run(python, command, RAY_ADDRESS="local", SPPRUNER_LOG_LEVEL="debug")
    run = RunOutput.open(str(output))
    columns = ["prompt_tokens", "completion_tokens"]
    rows = pa.concat_tables(run.read_units(run.committed_units(), columns))
    return Labelled(
        seconds=_last_file(output) - _first_read(said),
        prompt_tokens=sorted(rows["prompt_tokens"].to_pylist()),
        new_tokens=sorted(rows["completion_tokens"].to_pylist()),
    )


def label_by_ray_data_llm(
    python: Path,
    inputs: PeerInputs,
    corpus: Path,
    output: Path,
    *,
    prompt: str,
    spec: PruneSpec,
    gpu: bool,
) -> Labelled:
    """Ray Data LLM, whose vLLM loads this project's plugin only where the spec prunes. Raises
    FleetUnavailable with the end of its log."""
    result = output.with_suffix(".result.json")
    settings: dict[str, Any] = {
        "corpus": str(corpus),
        "output": str(output),
        "result": str(result),
        "model": str(inputs.model),
        "engine": inputs.settings,
        "slots": inputs.settings["max_num_seqs"],
        "prompt": prompt,
        "new_tokens": inputs.new_tokens,
        "prune": None if spec.is_dense else spec.to_dict(),
        "gpu": gpu,
    }
    file = output.with_suffix(".json")
    file.write_text(json.dumps(settings))
    plugins = {"VLLM_PLUGINS": ""} if spec.is_dense else {}
    _run(python, [str(python), "-I", str(_RAY_DATA_LLM), str(file)], **plugins)
    found = json.loads(result.read_text())
    if len(set(found["keys"])) != len(found["keys"]):
        raise FleetUnavailable(f"Ray Data LLM: rows of {output} are there twice")
    return Labelled(
        seconds=found["seconds"],
        prompt_tokens=sorted(found["prompt_tokens"]),
        new_tokens=sorted(found["tokens"]),
    )


def _first_read(log: str) -> float:
    """When the job had read its first rows."""
    found = re.search(r"timestamp=(\S+) level=debug event=unit_read", log)
    if found is None:
        raise FleetUnavailable("the job's log does not say when it read its first rows")
    return datetime.fromisoformat(found[1]).timestamp()


def _last_file(output: Path) -> float:
    return max(file.stat().st_mtime for file in output.glob("*.parquet"))


def _run(python: Path, command: Sequence[str], **variables: str) -> str:
    """What it printed."""
    ended = subprocess.run(
        command,
        cwd=_REPOSITORY,
        env=peer_environment(python) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ended.returncode:
        last = "\n".join(ended.stdout.splitlines()[-_LOG_LINES:])
        what = " ".join(command[1:3])
        raise FleetUnavailable(f"{what} ended with status {ended.returncode}:\n{last}")
    return ended.stdout
