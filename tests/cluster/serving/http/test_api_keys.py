"""API keys: who is let in, how much of it, and that no key is ever written down."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ApiError, UsageError
from cluster.serving.http import api_keys
from cluster.serving.http.api_keys import (
    Allowance,
    ApiKey,
    ApiKeys,
    Holder,
    make_key,
    parse_keys,
    read_keys,
)
from cluster.serving.http.app import ApiSettings, create_app
from jobs import api_key
from tests.cluster.edge import USER_MESSAGE, RecordingReplica

BODY = {"model": "fake", "messages": [USER_MESSAGE]}
CHAT, MODELS = "/v1/chat/completions", "/v1/models"


def write(path: Path, *keys: ApiKey) -> str:
    entries = [
        {name: value for name in ApiKey.__slots__ if (value := getattr(key, name)) is not None}
        for key in keys
    ]
    path.write_text(yaml.safe_dump({"keys": entries}))
    return str(path)


def ask(
    keys: ApiKeys | None,
    *requests: tuple[str, str, str | None],
    settings: ApiSettings | None = None,
    server: tuple[str, int] | None = None,
) -> list[httpx.Response]:
    """The responses to (method, path, key)s, one after the other."""

    async def scenario() -> list[httpx.Response]:
        app: Any = create_app(
            RecordingReplica(), settings or ApiSettings(access_log=True), model="fake", keys=keys
        )

        async def served(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "server": server or scope["server"]}, receive, send)

        transport = httpx.ASGITransport(served)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [
                await client.request(
                    method,
                    path,
                    json=BODY if method == "POST" else None,
                    headers=None if key is None else {b"authorization": f"Bearer {key}".encode()},
                )
                for method, path, key in requests
            ]

    return asyncio.run(scenario())


def test_a_key_lets_its_holder_in_and_nothing_else_does(tmp_path: Path) -> None:
    (key, entry), (other, _) = make_key("team-a"), make_key("team-a")
    keys = ApiKeys.open(write(tmp_path / "keys.yaml", entry))
    wrong = (None, other, "", key[:-1], key + "x", entry.sha256, "ä" * 10)
    asked = [("POST", CHAT, key), ("GET", MODELS, key)]
    answered = ask(keys, *asked, *(("GET", MODELS, one) for one in wrong))
    assert [response.status_code for response in answered] == [200, 200, *[401] * len(wrong)]
    refused = answered[-1]
    assert refused.json()["error"]["type"] == "authentication_error"
    assert refused.headers["www-authenticate"] == "Bearer"


def test_health_and_the_description_need_no_key_and_a_key_in_the_url_is_none(
    tmp_path: Path,
) -> None:
    key, entry = make_key("a")
    keys = ApiKeys.open(write(tmp_path / "keys.yaml", entry))
    paths = ["/healthz", "/readyz", "/openapi.json", f"{MODELS}?api_key={key}"]
    answered = ask(keys, *(("GET", path, None) for path in paths))
    assert [response.status_code for response in answered] == [200, 200, 200, 401]
    assert answered[2].json()["security"] == [{"key": []}]


def test_keys_come_and_go_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "_REREAD_SECONDS", 0.0)
    (old, first), (new, second) = make_key("a", requests_per_minute=5), make_key("b")
    path = tmp_path / "keys.yaml"
    keys = ApiKeys.open(write(path, first))

    async def known(key: str) -> bool:
        try:
            await keys.holder(f"Bearer {key}")
        except ApiError:
            return False
        return True

    async def eventually(key: str, expected: bool) -> None:
        while await known(key) != expected:
            await asyncio.sleep(0.01)

    async def scenario() -> None:
        before = await keys.holder(f"bearer {old}")
        write(path, first, second)
        await eventually(new, True)
        assert await keys.holder(f"Bearer {old}") is before, "what it has used stays used"
        write(path, second)
        await eventually(old, False)
        path.write_text("{")  # while it is being replaced
        for _ in range(5):
            await asyncio.sleep(0.02)
            assert await known(new)

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_each_limit_answers_429_and_says_when_to_ask_again(tmp_path: Path) -> None:
    (by_requests, one), (by_tokens, two), (free, three) = (
        make_key("r", requests_per_minute=2),
        make_key("t", tokens_per_minute=50),
        make_key("f"),
    )
    keys = ApiKeys.open(write(tmp_path / "keys.yaml", one, two, three))
    asked = [by_requests] * 3 + [by_tokens] * 2 + [free] * 4
    answered = ask(keys, *(("POST", CHAT, key) for key in asked))
    assert [r.status_code for r in answered] == [200, 200, 429, 200, 429, *[200] * 4]
    refused = answered[2]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_a_limit_of_less_than_one_a_minute_is_one_in_more_minutes() -> None:
    now = 0.0
    allowance = Allowance(0.5, lambda: now)
    assert allowance.wait == 0
    allowance.use(1)
    assert allowance.wait == pytest.approx(120.0)
    now = 120.0
    assert allowance.wait == pytest.approx(0.0)


def test_a_key_that_was_taken_out_while_nobody_asked_is_not_let_in_once_more(
    tmp_path: Path,
) -> None:
    (old, first), (_, second) = make_key("a"), make_key("b")
    path = tmp_path / "keys.yaml"
    keys = ApiKeys.open(write(path, first))
    write(path, second)
    keys._read_at = keys._read_before = time.monotonic() - 3600

    async def scenario() -> None:
        with pytest.raises(ApiError, match="not known"):
            await keys.holder(f"Bearer {old}")

    asyncio.run(scenario())


def test_a_stream_that_is_closed_early_costs_what_it_has_said(tmp_path: Path) -> None:
    key, entry = make_key("a", tokens_per_minute=1000)
    keys = ApiKeys.open(write(tmp_path / "keys.yaml", entry))
    (holder,) = keys._holders.values()

    async def scenario() -> None:
        app: Any = create_app(RecordingReplica(), ApiSettings(), model="fake", keys=keys)
        body = json.dumps(BODY | {"stream": True}).encode()
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "query_string": b"",
            "server": ("127.0.0.1", 80),
            "headers": [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())],
        }
        said = asyncio.Event()
        sent: list[bytes] = []

        async def receive() -> dict[str, Any]:
            if not sent:
                sent.append(b"")
                return {"type": "http.request", "body": body, "more_body": False}
            await said.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if b'"content": "' in message.get("body", b"") and b'""' not in message["body"]:
                said.set()
                await asyncio.sleep(60)

        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(scenario())
    assert holder._tokens is not None
    assert holder._tokens._left < 1000


def test_requests_at_the_same_time_are_bounded_by_key() -> None:
    holder = Holder(make_key("a", concurrent=2)[1])
    with (
        holder.request(),
        holder.request(),
        pytest.raises(ApiError, match="2 requests at the same time"),
        holder.request(),
    ):
        pass
    with holder.request():
        pass


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 500)), max_size=60))
def test_an_allowance_never_gives_more_than_its_rate_and_one_burst(
    uses: list[tuple[float, float]],
) -> None:
    now = 0.0
    allowance, used, largest = Allowance(100.0, lambda: now), 0.0, 0.0
    for pause, amount in uses:
        now += pause
        if allowance.wait == 0:
            allowance.use(amount)
            used, largest = used + amount, max(largest, amount)
    assert used <= 100.0 + now * 100.0 / 60 + largest + 1e-6


def test_an_allowance_says_how_long_to_wait() -> None:
    now = 0.0
    allowance = Allowance(60.0, lambda: now)
    allowance.use(70)
    assert allowance.wait == pytest.approx(11.0)
    now = 11.0
    assert allowance.wait == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no YAML"),
        ("a: 1", "no list `keys`"),
        ("keys: [1]", "no list `keys`"),
        ("keys: [{name: a}]", "give name and sha256"),
        ("keys: [{name: a, sha256: secret-in-clear}]", "64 hexadecimal digits"),
        ("keys: [{name: a b, sha256: x}]", "letters, digits"),
        (f"keys: [{{name: a, sha256: {'a' * 64}, rate: 1}}]", "unknown rate"),
        (f"keys: [{{name: a, sha256: {'a' * 64}, concurrent: 0}}]", "above 0"),
        (f"keys: [{{name: a, sha256: {'a' * 64}}}, {{name: a, sha256: {'b' * 64}}}]", "one name"),
    ],
)
def test_a_file_that_is_none_of_keys_is_refused_and_not_repeated(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_keys(text)
    assert "secret-in-clear" not in str(caught.value)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"keys\.yaml"):
        read_keys(str(tmp_path / "keys.yaml"))


def test_the_command_adds_an_entry_to_a_file_and_shows_the_key_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.yaml"
    assert api_key.main(["team-a", "--concurrent", "4", "--file", str(file)]) == 0
    key = capsys.readouterr().out.strip().rsplit(" ", 1)[-1]
    (entry,) = read_keys(str(file))
    assert entry == ApiKey(
        name="team-a", sha256=hashlib.sha256(key.encode()).hexdigest(), concurrent=4
    )
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert api_key.main(["team-b", "--file", str(file)]) == 0
    assert [one.name for one in read_keys(str(file))] == ["team-a", "team-b"]
    assert api_key.main(["team-b", "--file", str(file)]) == 2, "the name is taken"
    assert api_key.main(["not a name"]) == 2
    assert len(read_keys(str(file))) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys.yaml"]


def test_without_a_file_the_entry_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert api_key.main(["team-a"]) == 0
    text, _, _ = capsys.readouterr().out.partition("key of")
    assert [key.name for key in parse_keys(text)] == ["team-a"]


def test_no_key_is_in_any_log_or_error(tmp_path: Path) -> None:
    (key, entry), (unknown, _) = make_key("team-a", requests_per_minute=1), make_key("x")
    keys = ApiKeys.open(write(tmp_path / "keys.yaml", entry))
    with structlog.testing.capture_logs() as logs:
        answered = ask(keys, *(("POST", CHAT, one) for one in (key, key, unknown)))
    written = str(logs) + "".join(response.text for response in answered)
    assert key not in written
    assert unknown not in written
    assert any(line.get("key") == "team-a" for line in logs)


def test_without_keys_other_machines_are_refused_unless_the_endpoint_is_public() -> None:
    asked = [("POST", CHAT, None), ("GET", MODELS, None), ("GET", "/healthz", None)]
    outside = ask(None, *asked, server=("10.1.2.3", 8000))
    assert [response.status_code for response in outside] == [403, 403, 200]
    assert outside[0].json()["error"]["code"] == "keys_required"
    for server in (("127.0.0.1", 8000), ("::1", 8000)):
        assert ask(None, *asked, server=server)[0].status_code == 200
    public = ask(None, *asked, settings=ApiSettings(public=True), server=("10.1.2.3", 8000))
    assert public[0].status_code == 200


def test_time_tells_nothing_of_how_much_of_a_key_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry is compared, whichever is right, and by a function for secrets."""
    made = [make_key(f"k{n}") for n in range(5)]
    keys = ApiKeys("unread", [entry for _, entry in made])
    keys._read_at = time.monotonic() + 3600
    compared: list[str] = []
    compare = hmac.compare_digest

    def counting(one: str, other: str) -> bool:
        compared.append(one)
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for key, _ in made:
        asyncio.run(keys.holder(f"Bearer {key}"))
    assert len(compared) == len(made) ** 2
