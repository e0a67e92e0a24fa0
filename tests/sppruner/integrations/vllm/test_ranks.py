"""Two ranks of tensor parallelism, each with half of the heads, keep the same tokens: those of one
rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_RUN = """
import json, sys
from dataclasses import replace
from sppruner.integrations.vllm.engine import VllmEngine
from tests.sppruner.integrations.vllm.requests import SPECS, facts, questions

model, ranks = sys.argv[1], int(sys.argv[2])
if __name__ == "__main__":
    engine = VllmEngine(
        model, slots=8, dtype="float32", enforce_eager=True, max_model_len=1024,
        tensor_parallel_size=ranks, distributed_executor_backend="mp",
    )
    said = []
    for spec in SPECS:
        requests = questions(8, spec)
        for request, result in zip(requests, engine.run(requests), strict=True):
            (rendered,) = engine._vllm.renderer.render_cmpl([engine.prompt(request)])
            (key,) = rendered["mm_hashes"]["image"]
            reports = engine._llm.collective_rpc("prune_reports", args=([key],))
            kept = {bytes(report[0][1]) for report in reports}
            assert len(reports) == ranks and len(kept) == 1, spec
            said.append([result.text, result.prompt_tokens, result.kept_tokens.hex()])
    print("SAID" + json.dumps(said))
"""


def answers(model: str, ranks: int, folder: Path) -> list[list[object]]:
    script = folder / "run.py"
    script.write_text(_RUN)
    ended = subprocess.run(
        [sys.executable, str(script), model, str(ranks)],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=Path(__file__).parents[4],
        env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("SAID"))
    found: list[list[object]] = json.loads(line.removeprefix("SAID"))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_agree_with_each_other_and_with_one_alone(tmp_path: Path) -> None:
    assert answers("tiny-llava", 2, tmp_path) == answers("tiny-llava", 1, tmp_path)
