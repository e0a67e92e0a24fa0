"""A hostile client beside a batch job and honest clients: it spoils nobody's answer."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import Fleet, open_fleet
from jobs import caption_corpus
from jobs.make_corpus import make_corpus
from sppruner.models.loading import EMBEDDED, resolve_model
from tests.cluster.edge import data_uri, image_part, text_part, user_message
from tests.integration.checks import check_every_row_once, committed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROWS: Final = int(os.environ.get("SPPRUNER_HOSTILE_ROWS", "600"))
HONEST: Final = 4


@pytest.fixture(scope="module")
def embedded(serving: str) -> Iterator[Fleet]:
    served = EngineSettings(model=EMBEDDED, revision=resolve_model(EMBEDDED).revision)
    with open_fleet(FleetSettings(engine=served)) as fleet:
        yield fleet


def square(side: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (side % 256, 80, 90)).save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def body(**fields: Any) -> dict[str, Any]:
    message = user_message(image_part(square(96)), text_part("describe the scene ."))
    return {"model": EMBEDDED, "messages": [message], "max_tokens": 16, **fields}


def bomb() -> str:
    """A PNG of a gigapixel in its header."""
    data = bytearray(base64.b64decode(square(8).partition(",")[2]))
    data[16:24] = (32768).to_bytes(4, "big") * 2
    return data_uri(bytes(data))


ATTACKS: Final[dict[str, Callable[[], dict[str, Any]]]] = {
    "temperature": lambda: body(temperature=5e-38),
    "windows": lambda: body(
        prune={"method": "sppruner", "retain": 0.2, "options": {"windows": 10_000}}
    ),
    "sigma": lambda: body(
        prune={"method": "sppruner", "retain": 0.2, "options": {"sigma": 1e-300}}
    ),
    "no method": lambda: body(prune={"method": "no-such-method"}),
    "stop": lambda: body(stop="x" * 1_000_000),
    "messages": lambda: {"model": EMBEDDED, "messages": [{}] * 200_000},
    "parts": lambda: body(messages=[user_message(*[text_part("a")] * 100_000)]),
    "text": lambda: body(messages=[user_message(text_part("word " * 800_000))]),
    "pixels": lambda: body(messages=[user_message(*[image_part(square(4000))] * 8)]),
    "bomb": lambda: body(messages=[user_message(image_part(bomb()))]),
    "seed": lambda: body(seed=2**64),
    "special": lambda: body(messages=[user_message(text_part("</s><user><pad>" * 50))]),
    "schema": lambda: body(
        structured_outputs={"json": {"type": "object", "properties": {"a" * 900: {}}}}
    ),
    "regex": lambda: body(structured_outputs={"regex": "(a|b)" * 700}),
    "depth": lambda: {"model": EMBEDDED, "messages": json.loads("[" * 400 + "]" * 400)},
    "tokens": lambda: body(max_tokens=2**40),
}


class Hostile(threading.Thread):
    """Sends every attack in turn, and leaves requests half sent, until it is told to stop."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.ended = threading.Event()
        self.statuses: dict[str, Counter[int]] = {name: Counter() for name in ATTACKS}

    def run(self) -> None:
        sent = {name: json.dumps(make()).encode() for name, make in ATTACKS.items()}
        halves: list[socket.socket] = []
        with httpx.Client(timeout=120, trust_env=False) as client:
            while not self.ended.is_set():
                for name, content in sent.items():
                    with suppress(httpx.HTTPError):
                        response = client.post(
                            f"{self._url}/v1/chat/completions",
                            content=content,
                            headers={"content-type": "application/json"},
                        )
                        self.statuses[name][response.status_code] += 1
                    if self.ended.is_set():
                        break
                if len(halves) < 200:
                    halves += [self._half() for _ in range(20)]
        for half in halves:
            half.close()

    def _half(self) -> socket.socket:
        place = urlsplit(self._url)
        opened = socket.create_connection((place.hostname or "", place.port or 80))
        opened.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n{"
        )
        return opened


class Honest(threading.Thread):
    """Asks the same question again and again."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.ended = threading.Event()
        self.answers: Counter[str] = Counter()

    def run(self) -> None:
        with httpx.Client(timeout=120, trust_env=False) as client:
            while not self.ended.is_set():
                response = client.post(f"{self._url}/v1/chat/completions", json=body())
                said = response.json()
                if response.status_code == 200:
                    self.answers[said["choices"][0]["message"]["content"]] += 1
                else:
                    self.answers[f"{response.status_code}: {said}"] += 1


def test_a_hostile_client_spoils_no_row_and_no_honest_request(embedded: Fleet, s3: str) -> None:
    make_corpus(kind="caption", rows=ROWS, output=f"{s3}/corpus", format="parquet", faults=False)
    alone = httpx.post(f"{embedded.http_url}/v1/chat/completions", json=body(), trust_env=False)
    expected = alone.json()["choices"][0]["message"]["content"]
    pid = embedded.stats().replicas[0].pid
    hostile = Hostile(embedded.http_url)
    honest = [Honest(embedded.http_url) for _ in range(HONEST)]
    clients: list[Hostile | Honest] = [hostile, *honest]
    for client in clients:
        client.start()
    try:
        code = caption_corpus.main(["--input", f"{s3}/corpus", "--output", f"{s3}/labels"])
    finally:
        for client in clients:
            client.ended.set()
        for client in clients:
            client.join(150)

    assert code == 0
    rows = committed(f"{s3}/labels")
    check_every_row_once(rows, ROWS)
    assert not [row["error_code"] for row in rows if row["error_code"]]
    answers = sum((one.answers for one in honest), Counter[str]())
    assert set(answers) == {expected}
    assert all(one.answers.total() >= 3 for one in honest), "none of them starved"
    assert all(status.total() for status in hostile.statuses.values()), "every attack was tried"
    statuses = sum(hostile.statuses.values(), Counter[int]())
    assert set(statuses) <= {200, 400, 404, 413, 422}, hostile.statuses
    assert embedded.stats().replicas[0].pid == pid, "the replica was never replaced"
    health = httpx.get(f"{embedded.http_url}/healthz", timeout=5, trust_env=False)
    assert health.status_code == 200
