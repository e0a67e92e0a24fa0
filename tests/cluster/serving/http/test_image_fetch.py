"""Images by URL: only from where it is allowed, never from inside, never more than the limits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.config import MediaLimits
from cluster.errors import ApiError, UsageError
from cluster.serving.http.image_fetch import AllowedPrefix, ImageFetcher
from cluster.store import open_store

LIMITS = MediaLimits(max_bytes=1000)


class Handler(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        answers: dict[str, Callable[[], None]] = {
            "/open/a.png": lambda: self.answer(b"image"),
            "/open/large": lambda: self.answer(b"x" * 5000),
            "/open/endless": self.endless,
            "/open/slow": lambda: time.sleep(3),
            "/open/zipped": lambda: self.answer(b"z", **{"Content-Encoding": "gzip"}),
            "/open/moved": lambda: self.move("/open/a.png"),
            "/open/loop": lambda: self.move("/open/loop"),
            "/open/inside": lambda: self.move("http://169.254.169.254/latest/meta-data"),
            "/open/out": lambda: self.move("/secret/a.png"),
            "/open/port": lambda: self.move("http://127.0.0.1:1/open/a.png"),
            "/open/file": lambda: self.move("file:///etc/passwd"),
        }
        answers.get(self.path.partition("?")[0], lambda: self.send_error(404))()

    def answer(self, data: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(10_000):
                self.wfile.write(b"x" * 1000)
        except OSError:
            pass  # the other side has had enough

    def move(self, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and the paths that it was asked for."""
    handler = type("Asked", (Handler,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as opened:
        opened.daemon_threads = True
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{opened.server_port}", handler.asked  # type: ignore[attr-defined]
        opened.shutdown()


def fetch(url: str, *prefixes: str, seconds: float = 5.0, **options: object) -> bytes:
    fetcher = ImageFetcher(prefixes, LIMITS, seconds=seconds, **options)  # type: ignore[arg-type]
    return asyncio.run(fetcher.fetch(url))


def refused(url: str, *prefixes: str, **options: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        fetch(url, *prefixes, **options)  # type: ignore[arg-type]
    return caught.value


def test_an_image_below_an_allowed_prefix_is_fetched(server: tuple[str, list[str]]) -> None:
    root, _ = server
    assert fetch(f"{root}/open/a.png", f"{root}/open/") == b"image"
    assert fetch(f"{root}/open/moved", f"{root}/open") == b"image"


@pytest.mark.parametrize(
    "path",
    [
        "/secret/a.png",
        "/open",
        "/opened/a.png",
        "/open/../secret/a.png",
        "/open/%2e%2e/secret/a.png",
        "/open/..%2fsecret/a.png",
        "/open/..\\secret/a.png",
    ],
)
def test_what_is_not_below_it_is_never_asked_for(server: tuple[str, list[str]], path: str) -> None:
    root, asked = server
    assert refused(f"{root}{path}", f"{root}/open/").api_code == "image_url_not_allowed"
    assert asked == []


@pytest.mark.parametrize("path", ["inside", "out", "port", "file"])
def test_every_redirect_is_checked_as_the_first_url(
    server: tuple[str, list[str]], path: str
) -> None:
    root, asked = server
    assert refused(f"{root}/open/{path}", f"{root}/open/").api_code == "image_url_not_allowed"
    assert asked == [f"/open/{path}"]


def test_redirects_bytes_time_and_compression_are_bounded(server: tuple[str, list[str]]) -> None:
    root, asked = server
    allowed = f"{root}/open/"
    assert "redirects" in str(refused(f"{allowed}loop", allowed))
    assert len(asked) == 4
    assert refused(f"{allowed}large", allowed).status == 413
    assert refused(f"{allowed}endless", allowed).status == 413
    assert "compressed" in str(refused(f"{allowed}zipped", allowed))
    assert "status 404" in str(refused(f"{allowed}none", allowed))
    started = time.monotonic()
    assert "nothing complete" in str(refused(f"{allowed}slow", allowed, seconds=0.3))
    assert time.monotonic() - started < 2.5


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:10.0.0.1"],
        ["fe80::1"],
        ["0.0.0.0"],
        ["224.0.0.1"],
        ["8.8.8.8", "192.168.1.1"],
        ["100.64.0.1"],
        [],
    ],
)
def test_a_name_with_an_address_inside_is_refused(addresses: Sequence[str]) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    allowed = "https://images.example.com/"
    error = refused(f"{allowed}a.png", allowed, resolve=resolve)
    assert error.api_code == "image_url_not_allowed"


def test_the_connection_goes_to_the_address_that_was_checked(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that turns to another address between the check and the connection."""
    root, asked = server
    port = int(root.rpartition(":")[2])
    said = iter([["127.0.0.1"]])

    async def resolve(host: str, port: int) -> Sequence[str]:
        return next(said)  # a second question would find nothing

    monkeypatch.setattr("cluster.serving.http.image_fetch._is_public", lambda address: True)
    allowed = f"http://images.example.com:{port}/open/"
    assert fetch(f"{allowed}a.png", allowed, resolve=resolve) == b"image"
    assert asked == ["/open/a.png"]


@pytest.mark.parametrize(
    "url",
    [
        "https://user:secret@images.example.com/a.png",
        "https://images.example.com:444/a.png",
        "http://images.example.com/a.png",
        "https://images.example.com.evil.example/a.png",
        "https://evil.example/https://images.example.com/a.png",
        "https://2130706433/a.png",
        "ftp://images.example.com/a.png",
        "https://images.example.com:x/a.png",
        "https://[::1/a.png",
        "https://images.example.com/" + "a" * 5000,
        "s3://other/a.png",
    ],
)
def test_urls_of_elsewhere_are_refused_and_secrets_are_not_repeated(url: str) -> None:
    error = refused(url, "https://images.example.com/")
    assert error.api_code == "image_url_not_allowed"
    assert "secret" not in str(error)


def test_a_signed_query_is_never_in_a_message(server: tuple[str, list[str]]) -> None:
    root, _ = server
    error = refused(f"{root}/open/none?X-Amz-Signature=abc", f"{root}/open/")
    assert "abc" not in str(error)


def test_objects_of_a_store_are_read_by_prefix(s3: str) -> None:
    store = open_store(s3)
    store.put("open/a.png", b"image")
    store.put("open/large", b"x" * 5000)
    store.put("secret/a.png", b"secret")
    allowed = f"{s3}/open/"
    assert fetch(f"{s3}/open/a.png", allowed) == b"image"
    assert refused(f"{s3}/open/large", allowed).status == 413
    assert refused(f"{s3}/secret/a.png", allowed).api_code == "image_url_not_allowed"
    assert refused(f"{s3}/open/none", allowed).api_code == "image_fetch_failed"


@pytest.mark.parametrize(
    "text", ["", "images.example.com", "file:///x", "https://", "https://a/?q"]
)
def test_what_is_no_prefix_stops_the_endpoint(text: str) -> None:
    with pytest.raises(UsageError, match="fetch="):
        AllowedPrefix.parse(text)
