"""`make local` for real: every part answers, a job shares it, and metrics have the names that
dashboard and alerts use."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from cluster.metrics import METRICS, PREFIX
from tests.cluster.edge import data_uri, image_part, text_part, user_message

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The places that it prints, by name, and `variables`."""
    log = tmp_path_factory.mktemp("local") / "log"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
    environment["HOME"] = str(tmp_path_factory.mktemp("home"))
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.local.up"],
            cwd=ROOT,
            env=environment | {"RAY_USAGE_STATS_ENABLED": "0"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    places = {"home": environment["HOME"]}
    try:
        for line in process.stdout:
            if line.startswith("ready"):
                break
            name, _, place = line.strip().partition("  ")
            places[name] = place.strip()
        else:
            pytest.fail(log.read_text()[-3000:])
        yield places
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
        process.stdout.close()


def ask(stack: dict[str, str]) -> httpx.Response:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 96), (200, 20, 20)).save(buffer, "PNG")
    message = user_message(image_part(data_uri(buffer.getvalue())), text_part("describe it ."))
    body = {"model": "tiny-llava", "messages": [message]}
    url = stack["Endpoint and page"] + "/v1/chat/completions"
    return httpx.post(url, json=body, timeout=60, trust_env=False)


def test_the_endpoint_answers_and_shows_its_page(stack: dict[str, str]) -> None:
    assert ask(stack).json()["usage"]["visual_tokens_kept"] == 32
    page = httpx.get(stack["Endpoint and page"] + "/", trust_env=False)
    assert "One image, densely and pruned" in page.text


def test_a_job_beside_it_uses_its_replicas_and_its_run_is_listed(stack: dict[str, str]) -> None:
    environment = os.environ | {"HOME": stack["home"]}
    environment |= dict(pair.split("=", 1) for pair in stack["Jobs beside it:"].split())
    command = [sys.executable, "jobs/make_corpus.py", "--kind", "caption", "--rows", "48"]
    command += ["--output", "s3://corpus/c"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)
    command = [sys.executable, "jobs/caption_corpus.py", "--model", "tiny-llava"]
    command += ["--input", "s3://corpus/c", "--output", "s3://labels/l"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "attached" in done.stderr
    runs = httpx.get(stack["Endpoint and page"] + "/v1/runs", trust_env=False).json()["data"]
    assert [(run["state"], run["rows_done"]) for run in runs] == [("completed", 48)]


def test_metrics_are_exported_under_the_names_that_dashboard_and_alerts_use(
    stack: dict[str, str],
) -> None:
    wanted = {
        f"ray_{PREFIX}{name}" + ("_bucket" if definition.kind == "histogram" else "")
        for name, definition in METRICS.items()
        # No error, no bound and no control block in what was asked here.
        if name not in ("request_errors_total", "kv_cache_usage_perc", "run_errors")
        and name != "run_saving_ratio"
    }
    assert ask(stack).status_code == 200
    deadline, missing = time.monotonic() + 60, wanted
    while missing and time.monotonic() < deadline:
        time.sleep(2)
        said = httpx.get(stack["Metrics"], timeout=10, trust_env=False).text
        seen = set(re.findall(rf"^(ray_{PREFIX}\w+){{", said, re.MULTILINE))
        missing = wanted - seen
    assert not missing


def test_prometheus_has_them_and_its_rules_are_loaded(stack: dict[str, str]) -> None:
    place = stack["Prometheus"]
    if not place.startswith("http"):
        pytest.skip(place)

    def query(path: str) -> Any:
        return httpx.get(f"{place}/api/v1/{path}", trust_env=False).json()["data"]

    rules = {rule["name"] for group in query("rules")["groups"] for rule in group["rules"]}
    assert "RequestsFail" in rules
    expression = urllib.parse.quote("sum(ray_sppruner_request_success_total)")
    found: list[Any] = []
    deadline = time.monotonic() + 90
    while not found and time.monotonic() < deadline:
        time.sleep(2)
        found = query(f"query?query={expression}")["result"]
    assert float(found[0]["value"][1]) >= 1
