"""The proxy's faults, as a client sees them and as they are recorded."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from cluster.demo.local_s3 import LocalS3
from tests.chaos import proxy as proxy_module
from tests.chaos.proxy import FAULTS, MOST_IN_A_ROW, FaultProxy

BODY = b"0123456789" * 10
# The server wants to see one, and checks nothing in it.
SIGNED = "AWS4-HMAC-SHA256 Credential=local/20260101/us-east-1/s3/aws4_request, Signature=0"


@pytest.fixture
def proxy(s3_server: LocalS3) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as started:
        yield started


def ask(
    proxy: FaultProxy, method: str, path: str, body: bytes | None = None, *, create: bool = False
) -> tuple[int, bytes]:
    """Status and body; raises what http.client raises."""
    place = urlsplit(proxy.endpoint)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=10)
    headers = {"Authorization": SIGNED} | ({"If-None-Match": "*"} if create else {})
    try:
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def only(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(proxy_module, "FAULTS", dict.fromkeys(FAULTS, 0) | {fault: 1})


def test_requests_pass_and_are_recorded(proxy: FaultProxy, s3: str) -> None:
    path = f"/{s3.removeprefix('s3://')}/a"
    proxy.begin(seed=1, rate=0.0)
    assert ask(proxy, "PUT", path, BODY, create=True)[0] == 200
    assert ask(proxy, "PUT", path, BODY, create=True)[0] == 412  # the real server's answer
    assert ask(proxy, "GET", path) == (200, BODY)
    first, second, third = proxy.exchanges()
    assert (first.applied, second.applied, third.applied) == (True, False, True)
    assert (first.method, first.path, first.only_if_absent, first.body) == ("PUT", path, True, BODY)
    assert second.status == 412


@pytest.mark.parametrize(
    ("fault", "status", "applied"),
    [("error_500", 500, False), ("slow_down", 503, False), ("conflict", 409, False),
     ("applied_500", 500, True)],
)  # fmt: skip
def test_errors_are_answered_with_and_without_effect(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch, fault: str, status: int,
    applied: bool,
) -> None:  # fmt: skip
    path = f"/{s3.removeprefix('s3://')}/a"
    only(monkeypatch, fault)
    proxy.begin(seed=1, rate=1.0)
    assert ask(proxy, "PUT", path, BODY, create=True)[0] == status
    (exchange,) = proxy.exchanges()
    assert (exchange.fault, exchange.applied) == (fault, applied)
    proxy.begin(seed=1, rate=0.0)
    assert ask(proxy, "GET", path)[0] == (200 if applied else 404)


def test_a_write_is_carried_out_long_after_its_client_gave_up(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/{s3.removeprefix('s3://')}/a"
    only(monkeypatch, "applied_late")
    monkeypatch.setattr(proxy_module, "_APPLIED_LATE_SECONDS", 3.0)
    proxy.begin(seed=1, rate=1.0)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(proxy, "PUT", path, b"late", create=True)
    assert proxy.exchanges() == []
    proxy.settle()
    (exchange,) = proxy.exchanges()
    assert (exchange.fault, exchange.applied, exchange.body) == ("applied_late", True, b"late")
    assert ask(proxy, "GET", path) == (200, b"late")


@pytest.mark.parametrize(("fault", "applied"), [("reset", False), ("lost_answer", True)])
def test_connections_end_before_and_after_the_effect(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch, fault: str, applied: bool
) -> None:
    path = f"/{s3.removeprefix('s3://')}/a"
    only(monkeypatch, fault)
    proxy.begin(seed=1, rate=1.0)
    with pytest.raises(ConnectionError):
        ask(proxy, "PUT", path, BODY, create=True)
    assert proxy.exchanges()[0].applied == applied
    proxy.begin(seed=1, rate=0.0)
    assert ask(proxy, "GET", path)[0] == (200 if applied else 404)


def test_bodies_end_too_early_or_are_stated_too_short(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/{s3.removeprefix('s3://')}/a"
    proxy.begin(seed=1, rate=0.0)
    ask(proxy, "PUT", path, BODY)
    only(monkeypatch, "cut_body")
    proxy.begin(seed=1, rate=1.0)
    with pytest.raises(http.client.IncompleteRead):
        ask(proxy, "GET", path)
    only(monkeypatch, "short_body")
    proxy.begin(seed=1, rate=1.0)
    assert ask(proxy, "GET", path) == (200, BODY[:50])


def test_faults_follow_from_the_seed_and_not_from_the_order(proxy: FaultProxy, s3: str) -> None:
    bucket = s3.removeprefix("s3://")
    keys = [f"/{bucket}/{number}" for number in range(8)]

    def faults(seed: int, order: list[str]) -> dict[str, str | None]:
        proxy.begin(seed=seed, rate=0.6)
        for path in order:
            try:
                ask(proxy, "PUT", path, BODY)
            except ConnectionError:
                continue
        return {exchange.path: exchange.fault for exchange in proxy.exchanges()}

    first = faults(3, keys)
    assert first == faults(3, keys[::-1])
    assert any(first.values())
    assert first != faults(4, keys)


def test_a_repeated_request_gets_through(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/{s3.removeprefix('s3://')}/a"
    only(monkeypatch, "error_500")
    proxy.begin(seed=1, rate=1.0)
    statuses = [ask(proxy, "PUT", path, BODY)[0] for _ in range(MOST_IN_A_ROW + 1)]
    assert statuses == [500] * MOST_IN_A_ROW + [200]


def test_an_outage_fails_everything_until_it_ends(proxy: FaultProxy, s3: str) -> None:
    path = f"/{s3.removeprefix('s3://')}/a"
    proxy.begin(seed=1, rate=0.0)
    proxy.start_outage("slow_down")
    assert {ask(proxy, "PUT", path, BODY)[0] for _ in range(9)} == {503}
    proxy.stop_outage()
    assert ask(proxy, "PUT", path, BODY)[0] == 200
