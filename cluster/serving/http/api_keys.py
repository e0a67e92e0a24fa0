"""API keys: who may ask, and how much.

A YAML file, on a disk that the edge sees or in an object store, holds of each key its holder's
name, the SHA-256 of the key and what the holder may use; `python jobs/api_key.py NAME` makes an
entry. A key is 256 random bits, so a plain hash of it cannot be searched. The file is read again
every few seconds: keys come and go without a restart.

    keys:
      - name: team-a
        sha256: 9f86d081884c7d65…
        requests_per_minute: 600
        tokens_per_minute: 200000
        concurrent: 16
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import structlog
import yaml

from cluster.errors import ApiError, StoreError, UsageError
from cluster.store import FIRST_CONTACT_S, open_store

logger = structlog.get_logger(__name__)

PREFIX: Final = "sk-spp-"
"""Of every key that is made here: scanners for leaked secrets find it."""
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_REREAD_SECONDS: Final = 5.0
_STALE_SECONDS: Final = 15.0
_STALE_WAIT_SECONDS: Final = 2.0
_MINUTE: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One entry of the file. Raises UsageError for one without meaning."""

    name: str
    """Of its holder, for logs; never the key."""
    sha256: str
    """Of the key, in hexadecimal digits."""
    requests_per_minute: float | None = None
    """None for any number."""
    tokens_per_minute: float | None = None
    """Prompt and answer together; None for any number."""
    concurrent: int | None = None
    """Requests at the same time; None for any number."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.@-]{1,64}", self.name):
            raise UsageError(f"key {self.name!r}: give a name of letters, digits and . - _ @")
        if not isinstance(self.sha256, str) or not _HASH.fullmatch(self.sha256):
            raise UsageError(
                f"key {self.name}: sha256 is 64 hexadecimal digits, not the key itself"
            )
        for limit in ("requests_per_minute", "tokens_per_minute", "concurrent"):
            value = getattr(self, limit)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < 1e12):
                raise UsageError(f"key {self.name}: {limit} {value!r}: give a number above 0")


def make_key(name: str, **limits: Any) -> tuple[str, ApiKey]:
    """A new key, which nothing but its holder keeps, and its entry."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, ApiKey(name=name, sha256=_hash(key), **limits)


def parse_keys(text: str) -> list[ApiKey]:
    """The entries of a file of keys. Raises UsageError; its message holds no part of the file but
    names."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError("the file of keys is no YAML") from None
    entries = content.get("keys") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise UsageError("the file of keys has no list `keys` of entries with name and sha256")
    known = {field.name for field in fields(ApiKey)}
    keys = []
    for entry in entries:
        if unknown := sorted(map(str, set(entry) - known)):
            raise UsageError(f"key {entry.get('name')!r}: unknown {', '.join(unknown)}")
        if not {"name", "sha256"} <= set(entry):
            raise UsageError(f"key {entry.get('name')!r}: give name and sha256")
        keys.append(ApiKey(**entry))
    names = [key.name for key in keys]
    if len(set(names)) < len(names):
        raise UsageError("two keys have one name: give each its own")
    return keys


def read_keys(uri: str) -> list[ApiKey]:
    """Raises UsageError for a file that is none of keys or is not there, StoreError for an object
    that cannot be read."""
    if "://" in uri:
        place, _, name = uri.rpartition("/")
        content = open_store(place).with_patience(FIRST_CONTACT_S).get(name)
    else:
        try:
            content = Path(uri).read_bytes()
        except OSError as error:
            raise UsageError(f"keys={uri}: {error.strerror}") from error
    return parse_keys(content.decode("utf-8", errors="replace"))


class Allowance:
    """What a holder may use in a minute, which comes back as time passes: at most a minute's worth
    at once. Use may exceed it, as an answer's length is known afterwards; then it is owed."""

    def __init__(self, per_minute: float, now: Callable[[], float]) -> None:
        self.per_minute, self._now = per_minute, now
        self._left, self._at = max(1.0, per_minute), now()

    @property
    def wait(self) -> float:
        """Seconds until there is any left; 0 where there is."""
        self._refill()
        return max(0.0, (1.0 - self._left) * _MINUTE / self.per_minute) if self._left < 1 else 0.0

    def use(self, amount: float) -> None:
        """Uses some of it."""
        self._refill()
        self._left -= amount

    def _refill(self) -> None:
        now = self._now()
        gained = (now - self._at) * self.per_minute / _MINUTE
        most = max(1.0, self.per_minute)  # one a quarter of an hour is one too
        self._left, self._at = min(most, self._left + gained), now


class Holder:
    """Who holds a key, and what is left of its limits."""

    def __init__(self, key: ApiKey, now: Callable[[], float] = time.monotonic) -> None:
        self.key = key
        self._running = 0
        limits = (key.requests_per_minute, key.tokens_per_minute)
        self._requests, self._tokens = (None if n is None else Allowance(n, now) for n in limits)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts one request for the length of the block. Raises ApiError beyond a limit."""
        if self.key.concurrent is not None and self._running >= self.key.concurrent:
            raise _too_many(f"{self.key.concurrent} requests at the same time", 1.0)
        for allowance, unit in ((self._requests, "requests"), (self._tokens, "tokens")):
            if allowance is not None and (wait := allowance.wait):
                raise _too_many(f"{allowance.per_minute:g} {unit} a minute", wait)
        if self._requests is not None:
            self._requests.use(1)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def used(self, tokens: int) -> None:
        """Tokens of an answered request."""
        if self._tokens is not None:
            self._tokens.use(tokens)


class ApiKeys:
    """The keys of one endpoint, read again as time passes. One event loop owns an instance."""

    def __init__(self, uri: str, keys: list[ApiKey]) -> None:
        self._uri = uri
        self._holders: dict[str, Holder] = {}
        self._read_at = self._read_before = time.monotonic()
        self._reading: asyncio.Task[None] | None = None
        self._take(keys)

    @classmethod
    def open(cls, uri: str) -> ApiKeys:
        """Raises as `read_keys`."""
        return cls(uri, read_keys(uri))

    async def holder(self, authorization: str | None) -> Holder:
        """Of the key in a header `Authorization: Bearer KEY`. Raises ApiError for none."""
        await self._refresh()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                "give an API key: Authorization: Bearer KEY", status=401, code="missing_api_key"
            )
        given, found = _hash(key.strip()), None
        for sha256, holder in self._holders.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(sha256, given):
                found = holder
        if found is None:
            raise ApiError("this API key is not known here", status=401, code="invalid_api_key")
        return found

    async def _refresh(self) -> None:
        if self._reading is None and time.monotonic() - self._read_at > _REREAD_SECONDS:
            self._reading = asyncio.create_task(self._reread())
        if self._reading is not None and time.monotonic() - self._read_before > _STALE_SECONDS:
            # Nobody has asked for long: who was taken out meanwhile is not let in once more.
            await asyncio.wait([self._reading], timeout=_STALE_WAIT_SECONDS)
        if self._reading is not None and self._reading.done():
            self._reading = None

    async def _reread(self) -> None:
        self._read_at = time.monotonic()
        try:
            self._take(await asyncio.to_thread(read_keys, self._uri))
            self._read_before = time.monotonic()
        except (UsageError, StoreError) as error:
            # Those that were known stay: a file that is being replaced locks nobody out.
            logger.error("keys_not_read", error=str(error))

    def _take(self, keys: list[ApiKey]) -> None:
        """A key that stays the same keeps what it has used."""
        before = self._holders
        self._holders = {}
        for key in keys:
            known = before.get(key.sha256)
            self._holders[key.sha256] = known if known and known.key == key else Holder(key)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", errors="replace")).hexdigest()


def _too_many(what: str, wait: float) -> ApiError:
    return ApiError(
        f"this key allows {what}: ask again in {wait:.0f} s",
        status=429,
        code="rate_limit_exceeded",
        retry_after=wait,
    )
