"""The main job on a real Ray, a real S3 server and the model in the repository."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pyarrow.parquet as pq
import pytest

from cluster.output.summary import summarise
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import Fleet, open_fleet
from cluster.serving.ray_session import serve_details
from cluster.store import open_store
from jobs import answer_vqa, caption_corpus, report
from jobs.make_corpus import make_corpus
from sppruner.models.loading import EMBEDDED, resolve_model
from sppruner.tiny import TINY_MODELS
from tests.integration.checks import (
    check_every_row_once,
    check_faults,
    check_pruned,
    committed,
    planted_faults,
)

ROWS = 200
TOKENS, KEPT = 144, 32


@pytest.fixture(scope="module")
def embedded(serving: str) -> Iterator[Fleet]:
    """A running application of the embedded model; jobs attach to it and leave it running."""
    served = EngineSettings(model=EMBEDDED, revision=resolve_model(EMBEDDED).revision)
    with open_fleet(FleetSettings(engine=served)) as fleet:
        yield fleet


def arguments(s3: str, *extra: str) -> list[str]:
    return ["--input", f"{s3}/corpus", "--output", f"{s3}/labels", *extra]


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_every_row_of_a_damaged_corpus_is_committed_exactly_once(
    embedded: Fleet, s3: str, format: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    make_corpus(kind="caption", rows=ROWS, output=f"{s3}/corpus", format=format, faults=True)
    assert caption_corpus.main(arguments(s3)) == 3
    rows = committed(f"{s3}/labels")
    check_every_row_once(rows, ROWS + (format == "webdataset"))
    check_faults(rows, planted_faults(f"{s3}/corpus"))
    check_pruned(rows, tokens=TOKENS, kept=KEPT)

    printed = capfd.readouterr().out
    too_few = f"not measured: {len(rows)} rows are too few"
    for text in ("completed with errors", "image_undecodable", "visual tokens", too_few):
        assert text in printed

    # A second invocation has nothing left to do: it reports that and starts nothing.
    assert caption_corpus.main(arguments(s3)) == 3
    again = capfd.readouterr()
    assert "nothing was left to do" in again.out
    assert "fleet_up" not in again.err
    assert committed(f"{s3}/labels") == rows


@pytest.mark.parametrize(
    ("extra", "shown"),
    [
        (["--retain", "0.333"], "0.222"),
        (["--prompt", "what is the background?"], "describe the image."),
        (["--method", "grid"], '"sppruner" → "grid"'),
        (["--limit", "8"], "limit"),
        (["--model", str(TINY_MODELS[EMBEDDED])], '"tiny-llava" →'),
    ],
)
def test_a_changed_setting_on_the_same_output_is_refused_and_listed(
    embedded: Fleet, s3: str, extra: list[str], shown: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make_corpus(kind="caption", rows=4, output=f"{s3}/corpus")
    assert caption_corpus.main(arguments(s3)) == 0
    before = open_store(f"{s3}/labels").list()
    assert caption_corpus.main(arguments(s3, *extra)) == 2
    refusal = capfd.readouterr().err
    assert shown in refusal
    assert "--output" in refusal
    assert open_store(f"{s3}/labels").list() == before


def test_vqa_with_references_reports_accuracy(
    embedded: Fleet, s3: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make_corpus(kind="vqa", rows=64, output=f"{s3}/corpus")
    assert answer_vqa.main(arguments(s3)) == 0
    printed = capfd.readouterr().out
    summary = summarise(f"{s3}/labels")
    assert summary.accuracy is not None
    assert summary.accuracy.scored == 64
    assert f"{100 * summary.accuracy.mean:.1f} % of 64 rows" in printed
    rows = committed(f"{s3}/labels")
    assert all(row["question"] and row["answer"] == row["text"] for row in rows)
    # The embedded model was trained on these questions; a guess is right about one time in three.
    assert summary.accuracy.mean > 0.9


def test_the_report_has_the_same_figures_from_the_output_only(
    embedded: Fleet, s3: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make_corpus(kind="caption", rows=24, output=f"{s3}/corpus")
    assert caption_corpus.main(arguments(s3, "--control-blocks", "1")) == 0
    capfd.readouterr()
    assert report.main([f"{s3}/labels", "--audit"]) == 0
    assert capfd.readouterr().out.endswith("1 units, 24 rows, 0 differences\n")
    assert report.main([f"{s3}/labels", "--json"]) == 0
    summary = json.loads(capfd.readouterr().out)
    rows = committed(f"{s3}/labels")
    assert summary["rows"] == 24
    assert summary["visual_tokens"] == sum(row["visual_tokens"] for row in rows) == 24 * TOKENS
    assert summary["visual_tokens_kept"] == sum(row["visual_tokens_kept"] for row in rows)
    assert summary["measured"]["control_rows"] == sum(row["is_control"] for row in rows) > 0
    seconds = sum(row["seconds"] for row in rows)
    assert summary["measured"]["seconds"] == pytest.approx(seconds, rel=1e-6)
    flops = summary["modelled"]
    assert flops["flops"]["vision"] == flops["flops_dense"]["vision"] > 0
    assert flops["flops"]["prefill"] < flops["flops_dense"]["prefill"]
    store = open_store(f"{s3}/labels")
    stored = json.loads(store.get("_run/summary.json"))
    assert stored["modelled"] == flops


def test_the_next_invocation_writes_a_missing_or_stale_summary(
    embedded: Fleet, tmp_path: Path
) -> None:
    local = str(tmp_path)
    make_corpus(kind="caption", rows=4, output=f"{local}/corpus")
    assert caption_corpus.main(arguments(local)) == 0
    summary = tmp_path / "labels" / "_run" / "summary.json"
    written = summary.read_text()
    summary.unlink()
    assert caption_corpus.main(arguments(local)) == 0
    assert json.loads(summary.read_text())["rows"] == 4
    summary.write_text(json.dumps(json.loads(written) | {"units_done": 0, "rows": 0}))
    assert caption_corpus.main(arguments(local)) == 0
    assert json.loads(summary.read_text())["rows"] == 4
    summary.write_text(written)
    assert caption_corpus.main(arguments(local)) == 0
    assert summary.read_text() == written, "what is true stays, with its attempt's figures"


def test_online_and_batch_requests_share_a_replica_and_give_equal_captions(
    embedded: Fleet, s3: str
) -> None:
    """The official client requests captions of corpus images while the job uses the replica."""
    make_corpus(kind="caption", rows=480, output=f"{s3}/corpus")
    file = open_store(f"{s3}/corpus").get("00000.parquet")
    images = {r["key"]: r["image"]["bytes"] for r in pq.read_table(io.BytesIO(file)).to_pylist()}
    before = embedded.stats()
    codes: list[int] = []
    job = threading.Thread(target=lambda: codes.append(caption_corpus.main(arguments(s3))))
    job.start()
    client = openai.OpenAI(base_url=f"{embedded.http_url}/v1", api_key="unused")
    online = {key: _caption(client, images[key]) for key in list(images)[::60]}
    was_running = job.is_alive()
    job.join()
    assert codes == [0]
    assert was_running, "the job ended before the online requests, so nothing was tested"
    after = embedded.stats()
    assert {r.pid for r in after.replicas} == {r.pid for r in before.replicas}
    assert after.rows - before.rows >= 480 + len(online)
    written = {row["key"]: row["text"] for row in committed(f"{s3}/labels")}
    assert online == {key: written[key] for key in online}


def test_a_job_without_a_running_application_removes_the_one_it_deployed(
    serving: str, s3: str
) -> None:
    make_corpus(kind="caption", rows=4, output=f"{s3}/corpus")
    before = apps()
    assert caption_corpus.main(arguments(s3, "--model", str(TINY_MODELS[EMBEDDED]))) == 0
    assert apps() == before


def apps() -> set[str]:
    details = serve_details()
    assert details is not None
    return set(details.applications)


def _caption(client: openai.OpenAI, image: bytes) -> str | None:
    url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    answer = client.chat.completions.create(
        model=EMBEDDED,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": caption_corpus.JOB.prompt},
                ],
            }
        ],
        max_tokens=caption_corpus.JOB.max_new_tokens,
        extra_body={"prune": {"method": "sppruner", "retain": 0.222}},
    )
    return answer.choices[0].message.content
