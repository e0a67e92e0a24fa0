"""S3 under scripted faults: a write is ours once or not at all, a read is whole or an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import urllib3
from botocore.exceptions import (
    ConnectionClosedError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    IncompleteReadError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
    ReadTimeoutError,
    SSLError,
)
from botocore.parsers import ResponseParserError
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ObjectGone, StoreError, UsageError
from cluster.output.run_output import RunOutput
from cluster.store import Patience, RangedFile, S3Store
from cluster.store.s3_errors import passing_reason
from tests.cluster.store.clock import EventfulClock, FakeClock
from tests.cluster.store.faulty_s3 import APPLIED, BUCKET, CONFLICTS, CUT, LOST, FaultyS3, Stored


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyS3]:
    with FaultyS3() as started, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", started.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "local")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "local")
        patch.setenv("AWS_REGION", "us-east-1")
        yield started


def store(seconds: float = 600) -> S3Store:
    """On a clock of its own, so that waiting takes no time."""
    return S3Store(BUCKET, "", patience=Patience(seconds=seconds, clock=FakeClock()))


OLD = Stored(body=b"old", writer="them before")
WRITES = st.lists(st.sampled_from((*LOST, *APPLIED, *CONFLICTS)), max_size=6)
READS = st.lists(st.sampled_from((*LOST, *CUT)), max_size=6)


@settings(max_examples=30)
@given(faults=WRITES, rival=st.none() | st.integers(0, 6))
def test_put_if_absent_is_ours_exactly_if_the_object_is(
    server: FaultyS3, faults: list[str], rival: int | None
) -> None:
    """Whatever answers are lost, and whenever another writer comes first."""
    server.reset()
    theirs = Stored(body=b"theirs", writer="them")
    server.script = list(faults)

    def create() -> None:
        server.objects.setdefault("unit", theirs)

    if rival is not None:
        server.script.insert(rival, create)
    won = store().put_if_absent("unit", b"ours", writer="me")
    kept = server.objects["unit"]
    assert kept in (theirs, Stored(body=b"ours", writer="me"))
    assert won == (kept != theirs)


@settings(max_examples=30)
@given(faults=WRITES, rival=st.none() | st.integers(0, 6))
def test_put_if_match_is_ours_exactly_if_the_object_is(
    server: FaultyS3, faults: list[str], rival: int | None
) -> None:
    server.reset()
    server.objects["unit"] = OLD
    theirs = Stored(body=b"theirs", writer="them")

    def replace_old() -> None:  # as a rival with put_if_match does
        if server.objects["unit"] == OLD:
            server.objects["unit"] = theirs

    server.script = list(faults)
    if rival is not None:
        server.script.insert(rival, replace_old)
    won = store().put_if_match("unit", b"ours", etag=OLD.etag, writer="me")
    kept = server.objects["unit"]
    assert kept in (theirs, Stored(body=b"ours", writer="me"))
    assert won == (kept != theirs)


def test_put_if_match_of_a_removed_object_is_not_ours(server: FaultyS3) -> None:
    server.reset()
    assert not store().put_if_match("unit", b"ours", etag=OLD.etag, writer="me")
    assert server.objects == {}


def test_an_object_that_vanished_after_a_refusal_is_created(server: FaultyS3) -> None:
    """412 means another's object; where there is none any more, nobody would have the unit."""
    server.reset()
    server.objects["unit"] = OLD
    server.script = ["412 PreconditionFailed", lambda: server.objects.clear()]
    assert store().put_if_absent("unit", b"ours", writer="me")
    assert server.objects["unit"].body == b"ours"


@settings(max_examples=30)
@given(faults=READS, start=st.integers(0, 12), length=st.integers(0, 12), pinned=st.booleans())
def test_a_range_is_whole_whatever_cuts_it(
    server: FaultyS3, faults: list[str], start: int, length: int, pinned: bool
) -> None:
    server.reset()
    kept = Stored(body=b"0123456789", writer="")
    server.objects["x"] = kept
    server.script = list(faults)
    etag = kept.etag if pinned else None
    data = store().get_range("x", start, start + length, etag=etag)
    assert data == kept.body[start : start + length]


@settings(max_examples=30)
@given(faults=READS)
def test_an_object_is_whole_whatever_cuts_it(server: FaultyS3, faults: list[str]) -> None:
    server.reset()
    server.objects["x"] = Stored(body=bytes(range(256)) * 2_000, writer="")
    server.script = list(faults)
    assert store().get("x") == server.objects["x"].body


@settings(max_examples=30)
@given(faults=READS, replaced=st.integers(0, 6))
def test_a_pinned_range_is_never_of_another_version(
    server: FaultyS3, faults: list[str], replaced: int
) -> None:
    server.reset()
    server.objects["x"] = OLD
    server.script = list(faults)
    new = Stored(body=b"new and longer", writer="")
    server.script.insert(replaced, lambda: server.objects.update(x=new))
    data = None
    with suppress(ObjectGone):
        data = store().get_range("x", 0, 3, etag=OLD.etag)
    assert data in (None, b"old")


@pytest.mark.parametrize("ignored", ["If-Match", "Range"])
def test_servers_that_ignore_what_reads_need_are_found_out(server: FaultyS3, ignored: str) -> None:
    """A proxy that drops headers would give bytes of another version, or a whole archive."""
    server.reset()
    server.objects["x"] = Stored(body=b"0123456789", writer="")
    server.ignored = {ignored}
    problem = "changed since" if ignored == "If-Match" else "ignores Range"
    with pytest.raises(StoreError, match=problem):
        store().get_range("x", 2, 4, etag=OLD.etag if ignored == "If-Match" else None)


def test_a_part_that_ends_too_early_is_asked_for_again(server: FaultyS3) -> None:
    """HTTP allows an answer with fewer bytes than the range asked for; parsers do not."""
    server.reset()
    server.objects["x"] = Stored(body=b"0123456789", writer="")
    server.shortened = 1
    assert store().get_range("x", 2, 8) == b"234567"
    assert len(server.requests) == 2


def test_an_answer_that_is_not_of_s3_is_no_answer(server: FaultyS3) -> None:
    """A login page of a proxy comes with status 200; no exception of a parser may reach a unit,
    which would become error rows."""
    server.reset()
    server.objects["x"] = OLD
    server.script = ["200", "200"]
    assert store().head("x") == store().head("x")
    server.script = ["200 Page", "200 Page"]
    assert store().get_range("x", 0, 3) == b"old"


def test_a_server_that_keeps_the_second_writer_is_found_out(server: FaultyS3) -> None:
    server.reset()
    assert store().honours_put_if_absent("_run/probe")
    assert store().honours_put_if_absent("_run/probe")  # at resume
    assert len(server.requests) <= 5
    server.ignored = {"If-None-Match"}
    assert not store().honours_put_if_absent("_run/probe")
    server.ignored = {"If-Match"}
    assert store().honours_put_if_absent("_run/probe")
    assert not store().honours_put_if_match("_run/probe")
    server.ignored = {"If-None-Match"}
    with pytest.raises(UsageError, match="ignores If-None-Match"):
        RunOutput(store()).check_first_writer_wins()
    server.ignored = {"If-Match"}
    with pytest.raises(UsageError, match="ignores If-Match"):
        RunOutput(store()).check_replaced_by_version()


@pytest.mark.parametrize(
    "code",
    [
        "403 AccessDenied",
        "403 InvalidAccessKeyId",
        "403 SignatureDoesNotMatch",
        "404 NoSuchBucket",
        "501 NotImplemented",
        "400 InvalidArgument",
    ],
)
def test_an_error_that_stays_takes_one_request(server: FaultyS3, code: str) -> None:
    server.reset()
    server.script = [code]
    with pytest.raises(StoreError, match=code.split()[1]) as caught:
        store().get("x")
    assert not isinstance(caught.value, ObjectGone)
    assert server.requests == ["GET x"]


def test_an_outage_longer_than_the_patience_says_how_long_it_was_tried(server: FaultyS3) -> None:
    server.reset()
    server.script = ["503 SlowDown"] * 1_000
    with pytest.raises(StoreError, match=r"s3://bucket/x: .*SlowDown, tried for 600 s"):
        store().get("x")
    server.script = ["drop"] * 1_000
    with pytest.raises(StoreError, match=r"no answer from http://.*tried for 30 s"):
        store(30).get("x")


def test_credentials_that_come_late_are_found(
    server: FaultyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A node's metadata service is throttled, or a file is mounted late: a client remembers that it
    found none."""
    server.reset()
    server.objects["x"] = OLD
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    text = "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"
    clock = EventfulClock(1, lambda: file.write_text(text))
    assert S3Store(BUCKET, "", patience=Patience(seconds=60, clock=clock)).get("x") == b"old"
    assert server.requests == ["GET x"]


@pytest.mark.parametrize("ahead", [-3_600, 3_600])
@pytest.mark.parametrize("method", ["get", "head"])
def test_a_clock_that_is_wrong_for_a_while_costs_time_alone(
    server: FaultyS3, method: str, ahead: float
) -> None:
    """A machine wakes up, or its date is set; an answer to HEAD has no body that says so."""
    server.reset()
    server.objects["x"], server.ahead = OLD, ahead
    server.script = ["403 RequestTimeTooSkewed"] * 3
    assert getattr(store(), method)("x")
    server.script = ["403 RequestTimeTooSkewed"] * 1_000
    with pytest.raises(StoreError, match=r"clock is wrong: set it \(RequestTimeTooSkewed, tried"):
        getattr(store(), method)("x")


def test_an_answer_without_a_reason_is_about_rights_where_the_clock_is_right(
    server: FaultyS3,
) -> None:
    server.reset()
    server.ahead, server.script = 800.0, ["403 AccessDenied"]
    with pytest.raises(StoreError, match="grant s3:ListBucket"):
        store().head("x")
    assert server.requests == ["HEAD x"]


def test_a_token_that_expired_is_renewed(server: FaultyS3) -> None:
    server.reset()
    server.objects["x"] = OLD
    server.script = ["400 ExpiredToken"]
    assert store().get("x") == b"old"


def test_an_endpoint_that_is_no_url_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(UsageError, match="AWS_ENDPOINT_URL"):
        store().get("x")


PASSING = [
    NoCredentialsError(),
    CredentialRetrievalError(provider="role", error_msg="throttled"),
    MetadataRetrievalError(error_msg="timeout"),
    EndpointConnectionError(endpoint_url="http://no.such.host"),
    ConnectTimeoutError(endpoint_url="http://store"),
    ReadTimeoutError(endpoint_url="http://store"),
    ConnectionClosedError(endpoint_url="http://store"),
    SSLError(endpoint_url="http://store", error="eof"),
    ProxyConnectionError(proxy_url="http://proxy"),
    IncompleteReadError(actual_bytes=1, expected_bytes=2),
    ResponseParserError("not XML"),
    urllib3.exceptions.SSLError("bad record"),
    ConnectionResetError("reset"),
]
STAYING = [PartialCredentialsError(provider="env", cred_var="key"), ProfileNotFound(profile="x")]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_errors_of_networks_and_roles_may_pass(error: Exception) -> None:
    assert passing_reason(error) == type(error).__name__


@pytest.mark.parametrize("error", STAYING, ids=lambda error: type(error).__name__)
def test_errors_of_settings_stay(error: Exception) -> None:
    assert passing_reason(error) is None


def test_a_404_of_a_proxy_is_no_missing_object(server: FaultyS3) -> None:
    """A load balancer without servers answers 404 to everything; a unit would be lost."""
    server.reset()
    server.objects["x"] = OLD
    server.script = ["404", "404"]
    with pytest.raises(StoreError, match="bucket does not exist") as caught:
        store().get_range("x", 0, 3)
    assert not isinstance(caught.value, ObjectGone)
    server.script = ["404", "404"]
    with pytest.raises(StoreError, match="bucket does not exist"):
        store().head("x")
    with pytest.raises(ObjectGone):
        store().get_range("y", 0, 3)


def test_a_large_object_is_read_in_bounded_requests(server: FaultyS3) -> None:
    server.reset()
    server.objects["x"] = Stored(body=bytes(range(256)) * 4_000, writer="")
    server.script = ["cut body", "drop", "cut chunks"]
    info = store().head("x")
    assert info is not None
    file = RangedFile(store(), info, window=100_000)
    assert b"".join(iter(lambda: file.read(7_777), b"")) == server.objects["x"].body
    assert server.requests.count("GET x") < 18
