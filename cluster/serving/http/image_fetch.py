"""Images that a request names by URL: none is fetched, unless the endpoint allows where from.

What is allowed is a list of prefixes, `https://images.example.com/public/` or
`s3://bucket/prefix/`. A name is resolved once, its address must be a public one, and the connection
goes to that address: a name server cannot say one thing to the check and another to the connection.
Every redirect is checked as the first URL was. Bytes are counted while they come, none are
decompressed, and all of it has a deadline.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import aiohttp
import structlog
from aiohttp.abc import AbstractResolver, ResolveResult

from cluster.config import MediaLimits
from cluster.errors import ApiError, ObjectGone, StoreError, UsageError
from cluster.store import open_store

logger = structlog.get_logger(__name__)

_PORTS: Final = {"https": 443, "http": 80}
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_MOST_REDIRECTS: Final = 3
_AT_ONCE: Final = 16
_SECONDS: Final = 10.0
_MOST_CHARACTERS: Final = 4096

Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host, for a port."""


@dataclass(frozen=True, slots=True)
class AllowedPrefix:
    """Where images may come from."""

    scheme: str
    host: str
    port: int | None
    path: str
    """With a slash at both ends."""

    @classmethod
    def parse(cls, text: str) -> AllowedPrefix:
        """Raises UsageError for what is no prefix of images."""
        parts = urlsplit(text)
        if parts.scheme not in ("https", "http", "s3") or not parts.hostname:
            raise UsageError(f"fetch={text}: give https://HOST/PATH/ or s3://BUCKET/PREFIX/")
        if parts.query or parts.fragment or parts.username is not None:
            raise UsageError(f"fetch={text}: give scheme, host and path alone")
        path = f"{parts.path.rstrip('/')}/" if parts.path else "/"
        return cls(parts.scheme, parts.hostname, _port(parts), path)

    def holds(self, url: SplitResult) -> bool:
        """Whether a URL lies below it."""
        place = (url.scheme, url.hostname, _port(url))
        return place == (self.scheme, self.host, self.port) and url.path.startswith(self.path)


class ImageFetcher:
    """prefixes: what is allowed, as text. resolve: None for the system's. Raises UsageError."""

    def __init__(
        self,
        prefixes: Sequence[str],
        limits: MediaLimits,
        *,
        seconds: float = _SECONDS,
        resolve: Resolve | None = None,
    ) -> None:
        self._allowed = [AllowedPrefix.parse(prefix) for prefix in prefixes]
        self._limits, self._seconds = limits, seconds
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._resolve = resolve or _system_resolve

    async def fetch(self, url: str) -> bytes:
        """The bytes of an image. Raises ApiError, whose message holds no query of the URL."""
        try:
            async with asyncio.timeout(self._seconds), self._turns:
                if self._check(url).scheme == "s3":
                    return await asyncio.to_thread(self._read_object, url)
                return await self._follow(url)
        except TimeoutError:
            raise _failed(url, f"nothing complete came in {self._seconds:g} s") from None
        except aiohttp.ClientError as error:
            raise _failed(url, type(error).__name__) from error

    def _check(self, url: str) -> SplitResult:
        """The URL's parts, if it is allowed."""
        if len(url) > _MOST_CHARACTERS:  # before anything keeps it: urlsplit has a cache
            raise _refused("", f"a URL of more than {_MOST_CHARACTERS} characters")
        try:
            parts = urlsplit(url)
            _port(parts)
        except ValueError:
            raise _refused(url, "it is no URL") from None
        if parts.username is not None:
            raise _refused(url, "it holds credentials")
        # What is a step upwards for one server is a name for another: neither is needed.
        if any(step in (".", "..") for step in unquote(parts.path).replace("\\", "/").split("/")):
            raise _refused(url, "its path has steps upwards")
        if not any(prefix.holds(parts) for prefix in self._allowed):
            raise _refused(url, "this endpoint does not fetch from there")
        return parts

    async def _follow(self, url: str) -> bytes:
        for _ in range(_MOST_REDIRECTS + 1):
            found = await self._get(url)
            if isinstance(found, bytes):
                return found
            try:
                url = urljoin(url, found)
            except ValueError:
                raise _failed(url, "it redirects to what is no URL") from None
            self._check(url)
        raise _failed(url, f"more than {_MOST_REDIRECTS} redirects")

    async def _get(self, url: str) -> bytes | str:
        """The image, or where it is instead."""
        parts = self._check(url)
        assert parts.hostname is not None
        address = await self._public_address(url, parts)
        connector = aiohttp.TCPConnector(resolver=_Fixed(address), use_dns_cache=False)
        async with (
            aiohttp.ClientSession(
                connector=connector, auto_decompress=False, trust_env=False
            ) as session,
            session.get(
                url, allow_redirects=False, headers={"Accept-Encoding": "identity"}
            ) as response,
        ):
            if response.status in _REDIRECTS and "Location" in response.headers:
                return response.headers["Location"]
            if response.status != 200:
                raise _failed(url, f"status {response.status}")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _failed(url, "it is compressed")
            data = bytearray()
            async for piece in response.content.iter_chunked(65_536):
                data += piece
                if len(data) > self._limits.max_bytes:
                    raise _too_large(self._limits)
            return bytes(data)

    async def _public_address(self, url: str, parts: SplitResult) -> str:
        host, port = parts.hostname or "", _port(parts) or 0
        try:
            ipaddress.ip_address(host)
        except ValueError:
            pass
        else:
            return host  # whoever allowed an address meant this one
        try:
            addresses = await self._resolve(host, port)
        except OSError as error:
            raise _failed(url, "its host has no address") from error
        if not addresses or not all(_is_public(address) for address in addresses):
            raise _refused(url, "its host is on a private network")
        return addresses[0]

    def _read_object(self, url: str) -> bytes:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        try:
            store = open_store(f"s3://{bucket}").with_patience(self._seconds)
            data = store.get_range(key, 0, self._limits.max_bytes + 1)
        except ObjectGone:
            raise _failed(url, "there is no such object") from None
        except (StoreError, UsageError) as error:
            logger.warning("image_not_read", error=str(error))
            raise _failed(url, "the store does not give it") from error
        if len(data) > self._limits.max_bytes:
            raise _too_large(self._limits)
        return data


class _Fixed(AbstractResolver):
    """Says the address that was checked, whatever is asked."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        version = ipaddress.ip_address(self._address).version
        return [
            ResolveResult(
                hostname=host,
                host=self._address,
                port=port,
                family=socket.AF_INET6 if version == 6 else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
        ]

    async def close(self) -> None:
        """Nothing to close."""


async def _system_resolve(host: str, port: int) -> Sequence[str]:
    found: list[Any] = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    )
    return [str(entry[4][0]) for entry in found]


def _is_public(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    # An IPv4 address may come in IPv6's clothes.
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return found.is_global and not found.is_multicast and (inner is None or inner.is_global)


def _port(parts: SplitResult) -> int | None:
    return parts.port or _PORTS.get(parts.scheme)


def _shown(url: str) -> str:
    """Without what may be a secret: credentials, query and fragment."""
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"[:200]
    except ValueError:
        return "the URL"


def _refused(url: str, why: str) -> ApiError:
    return ApiError(f"{_shown(url)}: {why}", code="image_url_not_allowed", param="messages")


def _failed(url: str, why: str) -> ApiError:
    return ApiError(f"{_shown(url)}: {why}", code="image_fetch_failed", param="messages")


def _too_large(limits: MediaLimits) -> ApiError:
    return ApiError(
        f"an image of more than {limits.max_bytes:,} bytes",
        status=413,
        code="image_too_large",
        param="messages",
    )
