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
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from cluster.accounting.ledger import UnitLedger
from cluster.config import MediaLimits
from cluster.controller import get_controller
from cluster.errors import Busy
from cluster.serving.fleet import Fleet
from cluster.serving.http.app import ApiSettings
from sppruner.spec import Budget, PruneSpec
from tests.cluster.edge import (
    ASKED,
    Recorded,
    ask,
    data_uri,
    image_part,
    refusal,
    send,
    text_part,
    user,
)
from tests.cluster.fake_engine import expected_text, picture


def test_an_answer_has_openais_shape_and_says_how_many_visual_tokens_were_kept() -> None:
    answer = ask(prune={"method": "sppruner", "retain": 0.22}).json()

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


def test_the_endpoints_default_pruning_applies_where_a_request_asks_for_none() -> None:
    half = ApiSettings(default_spec=PruneSpec(method="grid", budget=Budget(ratio=0.5)))
    assert ask(settings=half).json()["usage"]["visual_tokens_kept"] == 50
    dense = ask(settings=half, prune={"method": "none"}).json()
    assert dense["usage"]["visual_tokens_kept"] == 100


def test_a_system_prompt_means_the_same_as_a_string_and_as_a_list() -> None:
    replicas = Recorded()
    for content in ("be brief", [text_part("be brief")]):
        ask(replicas, messages=[{"role": "system", "content": content}, ASKED])
    assert [call.system for call in replicas.calls] == ["be brief"] * 2


def test_generation_settings_reach_the_engine_and_greedy_requests_share_one_setting() -> None:
    replicas = Recorded()
    ask(replicas, max_completion_tokens=7, temperature=0.5, top_p=0.9, seed=3)
    ask(replicas, max_tokens=9, seed=1)
    ask(replicas, max_tokens=9, seed=2, temperature=0)
    first, second, third = (call.generation for call in replicas.calls)
    assert (first.max_new_tokens, first.temperature, first.top_p, first.seed) == (7, 0.5, 0.9, 3)
    assert second == third


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": []}, "tools"),
        ({"stop": ""}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"prune": {"method": "sppruner", "retain": 1.5}}, "prune"),
        ({"prune": {"method": "sppruner", "retain": 0.5, "tokens": 5}}, "prune"),
        ({"prune": {"method": "sppruner", "keep": 0.5}}, "prune.keep"),
        ({"messages": []}, "messages"),
        ({"messages": [ASKED, ASKED]}, "messages"),
        ({"messages": [user(*[image_part(data_uri(b"x"))] * 9)]}, "messages"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_not_ignored(
    fields: dict[str, Any], param: str
) -> None:
    replicas = Recorded()
    status, error = refusal(ask(replicas, **fields))
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param or error["param"].startswith(f"{param}.")
    assert not replicas.calls


def test_labels_of_a_request_are_taken_and_left_alone() -> None:
    assert ask(user="me", metadata={"a": "b"}, stream_options=None).status_code == 200


@pytest.mark.parametrize(
    "url", ["https://example.com/a.png", "http://169.254.169.254/", "file:///etc/passwd", "x"]
)
def test_no_url_is_ever_fetched(url: str) -> None:
    status, error = refusal(ask(messages=[user(image_part(url))]))
    assert (status, error["code"]) == (400, "image_url_not_supported")
    assert "fetches nothing" in error["message"]


def test_bad_base64_and_bytes_that_are_no_image_are_the_clients_error() -> None:
    status, error = refusal(ask(messages=[user(image_part("data:image/png;base64,@@@"))]))
    assert (status, error["code"]) == (400, "invalid_image")
    status, error = refusal(ask(messages=[user(image_part(data_uri(b"<html>")))]))
    assert (status, error["code"]) == (400, "image_undecodable")


def test_an_image_over_the_limit_is_refused_before_it_is_decoded() -> None:
    replicas = Recorded()
    small = ApiSettings(media=MediaLimits(max_bytes=100))
    status, error = refusal(ask(replicas, small, messages=[user(image_part(data_uri(b"x" * 200)))]))
    assert (status, error["code"]) == (413, "image_too_large")
    assert not replicas.calls


@pytest.mark.parametrize("stated", [True, False])
def test_a_body_over_the_limit_is_read_no_further(stated: bool) -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        for _ in range(1000):
            read += 1000
            yield b" " * 1000

    headers = {"content-length": "1000000"} if stated else {}
    small = ApiSettings(max_body_bytes=5000)
    response = send(
        "POST", "/v1/chat/completions", settings=small, content=endless(), headers=headers
    )
    status, error = refusal(response)
    assert (status, error["code"]) == (413, "body_too_large")
    assert read < 10_000


def test_an_unknown_model_is_404_and_names_the_one_there_is() -> None:
    status, error = refusal(ask(model="gpt-4o"))
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'fake'" in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": 1}'])
def test_a_body_that_is_no_request_is_400(body: bytes) -> None:
    assert refusal(send("POST", "/v1/chat/completions", content=body))[0] == 400


def test_an_unknown_path_and_method_have_openais_error_shape_too() -> None:
    assert refusal(send("GET", "/v1/nothing"))[0] == 404
    assert refusal(send("GET", "/v1/chat/completions"))[0] == 405


@pytest.mark.parametrize(
    "failure",
    [Busy("full"), BackPressureError(9, 8), ActorDiedError()],
    ids=lambda e: type(e).__name__,
)
def test_overload_and_a_dying_replica_are_503_with_retry_after(failure: Exception) -> None:
    response = ask(Recorded(failure))
    status, error = refusal(response)
    assert (status, error["code"], error["type"]) == (503, "overloaded", "server_error")
    assert response.headers["retry-after"] == "1"


def test_an_internal_error_says_nothing_of_the_inside() -> None:
    status, error = refusal(ask(Recorded(TypeError("secret path"))))
    assert (status, error["code"]) == (500, "internal")
    assert "secret" not in json.dumps(error)


def test_the_engines_own_errors_are_400_for_the_prompt_and_500_for_the_model() -> None:
    bad = user(text_part("bad"), image_part(data_uri(picture(1))))
    assert refusal(ask(messages=[bad]))[0] == 400
    failing = user(text_part("raise"), image_part(data_uri(picture(1))))
    status, error = refusal(ask(messages=[failing]))
    assert (status, error["code"]) == (500, "inference_failed")
    assert "raised" not in error["message"]


def test_stop_strings_travel_as_one_or_several() -> None:
    replicas = Recorded()
    ask(replicas, stop="x")
    ask(replicas, stop=["x", "yz"])
    assert [call.generation.stop for call in replicas.calls] == [("x",), ("x", "yz")]


# From here on with real Serve and the official client.


@pytest.fixture(scope="module")
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.http_url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_the_official_client_gets_an_answer_with_pruning_in_extra_body(
    client: openai.OpenAI,
) -> None:
    answer = client.chat.completions.create(
        model="fake-model",
        messages=[cast(Any, ASKED)],
        extra_body={"prune": {"method": "sppruner", "retain": 0.1}},
    )
    assert answer.choices[0].message.content == expected_text(picture(1), 10)
    assert answer.usage is not None
    assert answer.usage.model_extra == {"visual_tokens": 100, "visual_tokens_kept": 10}
    assert [model.id for model in client.models.list()] == ["fake-model"]


def test_the_official_client_streams_to_done_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fake-model",
            messages=[cast(Any, ASKED)],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected_text(picture(1))
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, None, "stop"]
    assert chunks[-1].usage is not None


def test_the_official_client_raises_its_typed_errors(client: openai.OpenAI) -> None:
    remote = user(image_part("https://example.com/a.png"))
    with pytest.raises(openai.BadRequestError, match="fetches nothing"):
        client.chat.completions.create(model="fake-model", messages=[remote])  # type: ignore[list-item]
    with pytest.raises(openai.NotFoundError, match="fake-model"):
        client.chat.completions.create(model="other", messages=[ASKED])  # type: ignore[list-item]


def test_a_client_that_goes_away_takes_its_request_out_of_the_queue(fleet: Fleet) -> None:
    url = f"{fleet.http_url}/v1/chat/completions"
    slow = {"model": "fake-model", "messages": [user(text_part("slow"), ASKED["content"][1])]}
    quick = {"model": "fake-model", "messages": [ASKED], "max_tokens": 5}

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


def test_runs_are_those_the_controller_knows(fleet: Fleet) -> None:
    url = f"{fleet.http_url}/v1/runs"
    ray.kill(get_controller())  # runs of other tests
    assert httpx.get(url).json() == {"object": "list", "data": []}
    controller = get_controller()
    try:
        ray.get(
            controller.register.remote(
                "r1",
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
