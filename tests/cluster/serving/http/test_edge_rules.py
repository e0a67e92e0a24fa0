"""Who may ask, under which name; request ids; the line that each request leaves in the log."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from cluster.serving.http.app import ApiSettings
from tests.cluster.edge import RecordingReplica, complete, read_error, send_request

PATH = "/v1/models"


def status(settings: ApiSettings | None = None, **headers: str) -> int:
    return send_request("GET", PATH, settings=settings, headers=headers).status_code


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "a.localhost", "LOCALHOST:1"]
)
def test_addresses_and_localhost_are_always_known(host: str) -> None:
    assert status(host=host) == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "[::1", "a b"])
def test_another_name_is_refused_unless_it_was_given(host: str) -> None:
    response = send_request("GET", PATH, headers={"host": host})
    assert read_error(response)[0] == 421
    assert response.json()["error"]["code"] == "unknown_host"
    assert status(ApiSettings(hosts=("*",)), host=host) == 200


def test_names_that_were_given_are_known() -> None:
    assert status(ApiSettings(hosts=("Labels.example",)), host="labels.example:443") == 200


def test_a_page_of_another_origin_is_refused_and_its_request_does_no_work() -> None:
    replicas = RecordingReplica()
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
    response = send_request(
        "POST",
        "/v1/chat/completions",
        replicas,
        json=body,
        headers={"origin": "https://evil.example"},
    )
    assert read_error(response)[0] == 403
    assert response.json()["error"]["code"] == "origin_not_allowed"
    assert not replicas.requests
    assert status(origin="null") == 403


@pytest.mark.parametrize("origin", ["http://[", "http://]", "//", "x"])
def test_an_origin_that_is_none_is_refused(origin: str) -> None:
    assert status(origin=origin) == 403


def test_a_fault_of_ours_has_an_id_and_its_status_in_the_log() -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
    with structlog.testing.capture_logs() as logs:
        response = send_request(
            "POST",
            "/v1/chat/completions",
            RecordingReplica(TypeError("secret")),
            ApiSettings(access_log=True),
            json=body,
        )
    assert read_error(response)[0] == 500
    assert response.headers["x-request-id"]
    assert [line["status"] for line in logs if line["event"] == "request"] == [500]


def test_a_page_of_the_endpoint_itself_may_ask_and_one_that_was_given() -> None:
    assert status(host="localhost:8000", origin="http://localhost:8000") == 200
    assert status(host="localhost:8000", origin="http://localhost:9000") == 403
    allowed = ApiSettings(origins=("https://tool.example",))
    response = send_request(
        "GET", PATH, settings=allowed, headers={"origin": "https://tool.example"}
    )
    assert response.headers["access-control-allow-origin"] == "https://tool.example"
    assert "x-request-id" in response.headers["access-control-expose-headers"].lower()


def test_a_preflight_of_an_allowed_origin_is_answered() -> None:
    headers = {
        "origin": "https://tool.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    allowed = ApiSettings(origins=("https://tool.example",))
    answered = send_request("OPTIONS", "/v1/chat/completions", settings=allowed, headers=headers)
    assert answered.status_code == 200
    assert "authorization" in answered.headers["access-control-allow-headers"]
    refused = send_request("OPTIONS", "/v1/chat/completions", headers=headers)
    assert refused.status_code == 403


def test_head_is_answered_as_get_without_a_body() -> None:
    head, get = send_request("HEAD", PATH), send_request("GET", PATH)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


def test_a_request_id_joins_response_replica_and_log() -> None:
    replicas = RecordingReplica()
    with structlog.testing.capture_logs(
        processors=[structlog.contextvars.merge_contextvars]
    ) as logs:
        response = send_request(
            "POST",
            "/v1/chat/completions",
            replicas,
            json={"model": "fake", "messages": [{"role": "user", "content": "x"}]},
            headers={"x-request-id": "mine-1"},
        )
    assert response.headers["x-request-id"] == "mine-1"
    (asked,) = replicas.requests
    assert asked.id == "mine-1"
    (line,) = [line for line in logs if line["event"] == "request"]
    assert (line["request_id"], line["path"], line["status"]) == (
        "mine-1",
        "/v1/chat/completions",
        200,
    )
    assert line["completion"] == response.json()["id"]
    assert line["completion_tokens"] == response.json()["usage"]["completion_tokens"]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "ä", "a\tb"])
def test_an_id_that_could_break_a_log_is_replaced(given: str) -> None:
    response = send_request("GET", PATH, headers={"x-request-id": given.encode("latin-1")})
    assert response.headers["x-request-id"] not in ("", given)


def test_errors_have_an_id_too_and_health_checks_leave_no_line() -> None:
    assert complete(model="other").headers["x-request-id"]
    logs: list[Any]
    with structlog.testing.capture_logs() as logs:
        send_request("GET", "/healthz")
        send_request("GET", "/readyz")
    assert [line for line in logs if line["event"] == "request"] == []
