"""The HTTP API: OpenAI's shapes and errors, refused fields, limits, and the official client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import httpx
import openai
import pytest
import ray
from openai.types.chat import ChatCompletionUserMessageParam
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from cluster.accounting.ledger import UnitLedger
from cluster.config import MediaLimits
from cluster.controller import RunName, get_controller
from cluster.errors import Busy
from cluster.serving.fleet import Fleet
from cluster.serving.http.app import ApiSettings
from sppruner.spec import Budget, PruneSpec
from tests.cluster.edge import (
    USER_MESSAGE,
    RecordingReplica,
    complete,
    data_uri,
    image_part,
    read_error,
    send_request,
    text_part,
    user_message,
)
from tests.cluster.fake_engine import expected_text, picture


def test_a_response_has_openais_shape_and_the_visual_tokens_in_its_usage() -> None:
    answer = complete(prune={"method": "sppruner", "retain": 0.22}).json()

    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": expected_text(picture(1), 22),
        "refusal": None,
    }
    assert (answer["object"], choice["finish_reason"]) == ("chat.completion", "stop")
    usage = answer["usage"]
    assert (usage["visual_tokens"], usage["visual_tokens_kept"]) == (100, 22)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_default_pruning_applies_to_requests_without_a_prune_field() -> None:
    half_budget = ApiSettings(default_spec=PruneSpec(method="grid", budget=Budget(ratio=0.5)))
    assert complete(settings=half_budget).json()["usage"]["visual_tokens_kept"] == 50
    dense = complete(settings=half_budget, prune={"method": "none"}).json()
    assert dense["usage"]["visual_tokens_kept"] == 100


def test_a_system_prompt_may_be_a_string_or_a_list_of_parts() -> None:
    replicas = RecordingReplica()
    for content in ("be brief", [text_part("be brief")]):
        complete(replicas, messages=[{"role": "system", "content": content}, USER_MESSAGE])
    assert [call.system for call in replicas.requests] == ["be brief"] * 2


def test_sampling_params_reach_the_engine_and_are_equal_for_greedy_requests() -> None:
    replicas = RecordingReplica()
    complete(replicas, max_completion_tokens=7, temperature=0.5, top_p=0.9, seed=3)
    complete(replicas, max_tokens=9, seed=1)
    complete(replicas, max_tokens=9, seed=2, temperature=0)
    first, second, third = (call.generation for call in replicas.requests)
    assert (first.max_new_tokens, first.temperature, first.top_p, first.seed) == (7, 0.5, 0.9, 3)
    assert second == third


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 17}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"stop": ""}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"logprobs": True, "stream": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": {}, "choice": ["a"]}}, "structured_outputs"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"prune": {"method": "sppruner", "retain": 1.5}}, "prune"),
        ({"prune": {"method": "sppruner", "retain": 0.5, "tokens": 5}}, "prune"),
        ({"prune": {"method": "sppruner", "keep": 0.5}}, "prune.keep"),
        ({"messages": []}, "messages"),
        ({"messages": [user_message(*[image_part(data_uri(b"x"))] * 9)]}, "messages"),
    ],
)
def test_unsupported_fields_are_refused_by_name_and_not_ignored(
    fields: dict[str, Any], param: str
) -> None:
    replicas = RecordingReplica()
    status, error = read_error(complete(replicas, **fields))
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param or error["param"].startswith(f"{param}.")
    assert not replicas.requests


def test_several_answers_are_sampled_each_with_a_seed_of_its_own() -> None:
    replicas = RecordingReplica()
    answer = complete(replicas, n=3, temperature=0.5, seed=7).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [call.generation.seed for call in replicas.requests] == [7, 8, 9]
    usage, each = answer["usage"], complete().json()["usage"]
    assert usage["prompt_tokens"] == each["prompt_tokens"]
    assert usage["completion_tokens"] == 3 * each["completion_tokens"]


def test_an_answer_of_no_stated_length_fits_the_context_and_another_is_as_long_as_asked() -> None:
    replicas = RecordingReplica()
    complete(replicas)
    complete(replicas, max_tokens=9)
    assert [call.fit_context for call in replicas.requests] == [True, False]


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_schema": '{"type":"object"}'}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "integer"}, "strict": True},
                }
            },
            {"json_schema": '{"type": "integer"}'},
        ),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, {"json_schema": '{"type": "null"}'}),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"choice": ["yes", "no"]}),
        ({"structured_outputs": {"regex": "[0-9]+"}}, {"regex": "[0-9]+"}),
    ],
)
def test_the_form_of_an_answer_reaches_the_engine(
    fields: dict[str, Any], form: dict[str, Any] | None
) -> None:
    replicas = RecordingReplica()
    assert complete(replicas, **fields).status_code == 200
    (asked,) = replicas.requests
    found = asked.generation.format
    assert (found and found.to_dict()) == form


@pytest.mark.parametrize(
    ("details", "kept"),
    [(["auto"], 50), ([None], 50), (["low"], 11), (["high"], 100), (["low", "original"], 200)],
)
def test_detail_sets_the_budget_where_prune_does_not(details: list[str | None], kept: int) -> None:
    half = ApiSettings(
        default_spec=PruneSpec(method="grid", budget=Budget(ratio=0.5)),
        low_detail=PruneSpec(method="grid", budget=Budget(tokens=11)),
    )
    parts = [image_part(data_uri(picture(1))) for _ in details]
    for part, detail in zip(parts, details, strict=True):
        part["image_url"]["detail"] = detail
    asked = [user_message(text_part("what ?"), *parts)]
    assert complete(settings=half, messages=asked).json()["usage"]["visual_tokens_kept"] == kept
    told = complete(settings=half, prune={"method": "grid", "tokens": 7}, messages=asked).json()
    assert told["usage"]["visual_tokens_kept"] == 7


def test_pixels_of_all_images_are_bounded_by_their_headers() -> None:
    replicas = RecordingReplica()
    few = ApiSettings(max_pixels=31)  # a picture has 16
    parts = [image_part(data_uri(picture(n))) for n in range(2)]
    status, error = read_error(complete(replicas, few, messages=[user_message(*parts)]))
    assert (status, error["code"]) == (413, "image_too_large")
    assert not replicas.requests
    told = complete(replicas, few, messages=[user_message(text_part("what ?"), parts[0])])
    assert told.status_code == 200


def test_images_count_for_each_answer_that_is_asked_for() -> None:
    few = ApiSettings(max_pixels=40)  # a picture has 16
    asked = [user_message(image_part(data_uri(picture(1))))]
    assert complete(settings=few, messages=asked, n=2).status_code == 200
    assert read_error(complete(settings=few, messages=asked, n=3))[0] == 413
    small = ApiSettings(max_image_bytes=2 * len(picture(1)))
    assert complete(settings=small, messages=asked, n=2).status_code == 200
    assert read_error(complete(settings=small, messages=asked, n=3))[0] == 413


def test_a_temperature_too_low_to_divide_by_is_greedy() -> None:
    replicas = RecordingReplica()
    assert complete(replicas, temperature=5e-38).status_code == 200
    assert replicas.requests[0].generation.temperature == 0


def test_one_model_is_retrieved_by_its_name() -> None:
    assert send_request("GET", "/v1/models/fake").json()["id"] == "fake"
    status, error = read_error(send_request("GET", "/v1/models/a/b"))
    assert (status, error["code"]) == (404, "model_not_found")


def test_liveness_is_of_the_process_and_readiness_of_a_replica() -> None:
    gone = RecordingReplica(ActorDiedError())
    assert send_request("GET", "/healthz", gone).status_code == 200
    status, error = read_error(send_request("GET", "/readyz", gone))
    assert (status, error["code"]) == (503, "not_ready")
    assert send_request("GET", "/readyz").status_code == 200
    assert send_request("GET", "/readyz", RecordingReplica(BackPressureError(9, 8))).is_success


def test_more_requests_than_places_are_told_to_come_again() -> None:
    response = complete(settings=ApiSettings(max_requests=0))
    assert (read_error(response)[0], response.headers["retry-after"]) == (503, "1")


def test_the_openapi_document_has_the_body_that_is_read_by_hand() -> None:
    document = send_request("GET", "/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    reference = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    name = reference.rsplit("/", 1)[-1]
    assert "messages" in document["components"]["schemas"][name]["required"]
    assert "ErrorBody" in json.dumps(chat["responses"]["default"])


@pytest.mark.parametrize(
    "url", ["https://example.com/a.png", "http://169.254.169.254/", "file:///etc/passwd", "x"]
)
def test_remote_urls_are_never_fetched(url: str) -> None:
    status, error = read_error(complete(messages=[user_message(image_part(url))]))
    assert (status, error["code"]) == (400, "image_url_not_supported")
    assert "fetches nothing" in error["message"]


def test_a_url_is_fetched_where_the_endpoint_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(self: Any, url: str) -> bytes:
        assert url == "https://images.example.com/a.png"
        return picture(1)

    monkeypatch.setattr("cluster.serving.http.image_fetch.ImageFetcher.fetch", fetch)
    replicas, allowed = RecordingReplica(), ApiSettings(fetch=("https://images.example.com/",))
    parts = [image_part("https://images.example.com/a.png"), image_part(data_uri(picture(2)))]
    assert complete(replicas, allowed, messages=[user_message(*parts)]).status_code == 200
    assert replicas.requests[0].images == (picture(1), picture(2))


def test_invalid_base64_and_bytes_that_are_not_an_image_are_client_errors() -> None:
    for payload in ("@@@", "…", "ÄÄÄÄ", "AAA\u0000"):
        uri = f"data:image/png;base64,{payload}"
        status, error = read_error(complete(messages=[user_message(image_part(uri))]))
        assert (status, error["code"]) == (400, "invalid_image"), payload
    status, error = read_error(complete(messages=[user_message(image_part(data_uri(b"<html>")))]))
    assert (status, error["code"]) == (400, "image_undecodable")


def test_an_image_over_the_limit_is_refused_before_it_is_decoded() -> None:
    replicas = RecordingReplica()
    byte_limit = ApiSettings(media=MediaLimits(max_bytes=100))
    status, error = read_error(
        complete(replicas, byte_limit, messages=[user_message(image_part(data_uri(b"x" * 200)))])
    )
    assert (status, error["code"]) == (413, "image_too_large")
    assert not replicas.requests


@pytest.mark.parametrize("stated", [True, False])
def test_a_body_over_the_limit_is_not_read_to_its_end(stated: bool) -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        for _ in range(1000):
            read += 1000
            yield b" " * 1000

    headers = {"content-length": "1000000"} if stated else {}
    body_limit = ApiSettings(max_body_bytes=5000)
    response = send_request(
        "POST", "/v1/chat/completions", settings=body_limit, content=endless(), headers=headers
    )
    status, error = read_error(response)
    assert (status, error["code"]) == (413, "body_too_large")
    assert read < 10_000


def test_an_unknown_model_is_404_and_the_error_names_the_served_one() -> None:
    status, error = read_error(complete(model="gpt-4o"))
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'fake'" in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": 1}'])
def test_an_invalid_body_is_400(body: bytes) -> None:
    assert read_error(send_request("POST", "/v1/chat/completions", content=body))[0] == 400


def test_errors_of_unknown_paths_and_methods_have_openais_shape() -> None:
    assert read_error(send_request("GET", "/v1/nothing"))[0] == 404
    assert read_error(send_request("GET", "/v1/chat/completions"))[0] == 405


@pytest.mark.parametrize(
    "failure",
    [Busy("full"), BackPressureError(9, 8), ActorDiedError()],
    ids=lambda e: type(e).__name__,
)
def test_overload_and_a_replica_death_are_503_with_retry_after(failure: Exception) -> None:
    response = complete(RecordingReplica(failure))
    status, error = read_error(response)
    assert (status, error["code"], error["type"]) == (503, "overloaded", "server_error")
    assert response.headers["retry-after"] == "1"


def test_an_internal_error_does_not_leak_its_message() -> None:
    status, error = read_error(complete(RecordingReplica(TypeError("secret path"))))
    assert (status, error["code"]) == (500, "internal")
    assert "secret" not in json.dumps(error)


def test_engine_errors_are_400_for_the_prompt_and_500_for_the_model() -> None:
    bad = user_message(text_part("bad"), image_part(data_uri(picture(1))))
    assert read_error(complete(messages=[bad]))[0] == 400
    told = read_error(complete(messages=[bad]))[1]
    assert (told["code"], told["param"]) == ("prompt_invalid", "messages")
    failing = user_message(text_part("raise"), image_part(data_uri(picture(1))))
    status, error = read_error(complete(messages=[failing]))
    assert (status, error["code"]) == (500, "inference_failed")
    assert "raised" not in error["message"]


def test_stop_may_be_one_string_or_several() -> None:
    replicas = RecordingReplica()
    complete(replicas, stop="x")
    complete(replicas, stop=["x", "yz"])
    assert [call.generation.stop for call in replicas.requests] == [("x",), ("x", "yz")]


# The tests below use the official client on a real Serve.


def typed_message(message: dict[str, Any]) -> ChatCompletionUserMessageParam:
    """The message under the official client's type."""
    return cast(ChatCompletionUserMessageParam, message)


@pytest.fixture(scope="module")
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.http_url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_the_official_client_passes_pruning_in_extra_body(
    client: openai.OpenAI,
) -> None:
    answer = client.chat.completions.create(
        model="fake-model",
        messages=[typed_message(USER_MESSAGE)],
        extra_body={"prune": {"method": "sppruner", "retain": 0.1}},
    )
    assert answer.choices[0].message.content == expected_text(picture(1), 10)
    assert answer.usage is not None
    assert answer.usage.model_extra == {"visual_tokens": 100, "visual_tokens_kept": 10}
    assert [model.id for model in client.models.list()] == ["fake-model"]


def test_the_official_client_receives_a_stream_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fake-model",
            messages=[typed_message(USER_MESSAGE)],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected_text(picture(1))
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, None, "stop"]
    assert chunks[-1].usage is not None


def test_the_official_client_raises_its_typed_errors(client: openai.OpenAI) -> None:
    remote = typed_message(user_message(image_part("https://example.com/a.png")))
    with pytest.raises(openai.BadRequestError, match="fetches nothing"):
        client.chat.completions.create(model="fake-model", messages=[remote])
    with pytest.raises(openai.NotFoundError, match="fake-model"):
        client.chat.completions.create(model="other", messages=[typed_message(USER_MESSAGE)])


def test_a_client_disconnect_removes_its_request_from_the_queue(fleet: Fleet) -> None:
    url = f"{fleet.http_url}/v1/chat/completions"
    slow = {
        "model": "fake-model",
        "messages": [user_message(text_part("slow"), USER_MESSAGE["content"][1])],
    }
    quick = {"model": "fake-model", "messages": [USER_MESSAGE], "max_tokens": 5}

    rows_before = fleet.stats().rows
    with ThreadPoolExecutor() as pool:
        running = pool.submit(httpx.post, url, json=slow, timeout=20)
        time.sleep(0.5)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=quick, timeout=0.5)
        while fleet.stats().replicas[0].waiting_online > 1:
            time.sleep(0.05)
        assert not running.done()
        assert running.result().status_code == 200
    assert fleet.stats().rows == rows_before + 1


def test_the_runs_route_lists_the_controllers_runs(fleet: Fleet) -> None:
    url = f"{fleet.http_url}/v1/runs"
    ray.kill(get_controller())  # runs of other tests
    assert httpx.get(url).json() == {"object": "list", "data": []}
    controller = get_controller()
    try:
        ray.get(
            controller.register.remote(
                RunName("r1", "s3://out"),
                meta={"output": "s3://out"},
                units_total=2,
                rows_total=20,
                units_done=["a"],
                ledger_so_far=UnitLedger(rows=10),
                max_error_share=1.0,
                error_share_after=1,
            )
        )
        (run,) = httpx.get(url).json()["data"]
        assert (run["run_id"], run["state"], run["rows_done"]) == ("r1", "running", 10)
    finally:
        ray.kill(controller)
