"""The store's promise to writers and readers, through a server that fails some requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.demo.local_s3 import LocalS3
from cluster.store import open_store
from tests.chaos import proxy as proxy_module
from tests.chaos.proxy import FAULTS, FaultProxy

KEYS = [f"key-{number}" for number in range(6)]
WRITERS = ["one", "two", "three"]


def test_each_key_has_one_winner_whose_bytes_everybody_reads(
    s3_server: LocalS3, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_module, "FAULTS", dict(FAULTS) | {"late": 0})
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.begin(seed=2, rate=0.2)
        store = open_store(f"{s3}/labels")

        def write(task: tuple[str, str]) -> tuple[str, str, bool]:
            key, writer = task
            return key, writer, store.put_if_absent(key, writer.encode() * 100, writer=writer)

        with ThreadPoolExecutor(6) as pool:
            tasks = [(key, writer) for key in KEYS for writer in WRITERS]
            outcomes = list(pool.map(write, tasks))
        for key in KEYS:
            (winner,) = [writer for k, writer, won in outcomes if k == key and won]
            assert store.get(key) == winner.encode() * 100
            assert store.get_range(key, 50, 150) == (winner.encode() * 100)[50:150]
        assert [info.key for info in store.list()] == KEYS
        assert {exchange.fault for exchange in proxy.exchanges()} > {None, "lost_answer"}
