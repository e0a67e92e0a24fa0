"""What the errors of an S3 server mean: which of them pass, and what to do about the others."""

from __future__ import annotations

import http.client
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import urllib3
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError

from cluster.errors import ObjectGone, StoreError

FORBIDDEN = {"AccessDenied", "403", "Forbidden"}
MISSING = {"NoSuchKey", "404", "NotFound"}
CHANGED = {"PreconditionFailed", "412"}
OUT_OF_RANGE = {"InvalidRange", "416"}
_SKEWED = "RequestTimeTooSkewed"
_MOST_SKEW = timedelta(minutes=15)

# Beyond what the status says: the server is busy or restarting, the request was cut on its way,
# another conditional write of the same key is under way, or this machine woke up with a clock that
# is set right in a moment. A bare 400 answers a HEAD, whose error has
# no body to say that a request timed out or a token expired.
_PASSING_CODES = {
    "400",
    "BadDigest",
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    _SKEWED,
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "ThrottledException",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
    "XAmzContentSHA256Mismatch",
}
_PASSING_STATUSES = {408, 409, 425, 429}
# A node whose metadata service is throttled has no credentials for a while, or keeps old ones.
_STALE_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "TokenRefreshRequired",
}
_NO_CREDENTIALS = (
    NoCredentialsError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    TokenRetrievalError,
)
# botocore lets some errors of the layers below through, while a body is read.
_LOWER_LAYERS = (
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
)
_CONNECTION_ERRORS = (BotoConnectionError, HTTPClientError, *_LOWER_LAYERS)
_BROKEN_ANSWERS = (IncompleteReadError, FlexibleChecksumError, ResponseParserError)

_PERMISSIONS = "the credentials lack a permission: grant s3:ListBucket, GetObject, PutObject"
_ADVICE = {
    "NoSuchBucket": "the bucket does not exist: create it, or check AWS_ENDPOINT_URL and the name",
    **dict.fromkeys(FORBIDDEN, _PERMISSIONS),
    "InvalidAccessKeyId": "the server does not know the access key: check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is of another access key: check AWS_SECRET_ACCESS_KEY",
    _SKEWED: "this machine's clock is wrong: set it",
    "PermanentRedirect": "the bucket is in another region: set AWS_REGION to the bucket's",
    "NotImplemented": "this server lacks conditional writes (If-None-Match, If-Match), needed here",
    **dict.fromkeys(_STALE_CREDENTIALS, "the session token has expired: renew the credentials"),
}


class Unsettled(Exception):
    """A conditional write was refused because of an object that was gone a moment later."""


def error_code(error: ClientError) -> str:
    """The server's name of the error; the HTTP status where the answer had no body."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return _SKEWED if code == "403" and _is_skewed(error) else code


def _is_skewed(error: ClientError) -> bool:
    """Whether the server's time is another than ours: the answer to a HEAD cannot say so."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        theirs = parsedate_to_datetime(headers["date"])
        return abs(theirs - datetime.now(UTC)) > _MOST_SKEW
    except (KeyError, ValueError, TypeError):  # none, no date, or one without a zone
        return False


def passing_reason(error: Exception) -> str | None:
    """The name of an error that may pass; None for one that waiting does not mend."""
    if isinstance(error, ClientError):
        code = error_code(error)
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        passes = (
            code in _PASSING_CODES
            or code in _STALE_CREDENTIALS
            or status in _PASSING_STATUSES
            or (status >= 500 and code not in ("NotImplemented", "501"))
        )
        return (code or str(status)) if passes else None
    kinds = (Unsettled, *_NO_CREDENTIALS, *_CONNECTION_ERRORS, *_BROKEN_ANSWERS)
    return type(error).__name__ if isinstance(error, kinds) else None


def lacks_credentials(error: Exception) -> bool:
    """Whether credentials must be looked up anew: a client keeps what it found, even nothing."""
    if isinstance(error, ClientError):
        return error_code(error) in ("400", *_STALE_CREDENTIALS)
    return isinstance(error, _NO_CREDENTIALS)


def store_error(error: Exception, uri: str, endpoint: str, patience: float) -> StoreError:
    """The error for people. endpoint: URL of the server. patience: seconds that it was given."""
    waited = f", tried for {patience:.0f} s" if passing_reason(error) and patience else ""
    if isinstance(error, ClientError):
        code = error_code(error)
        if code in MISSING:
            return ObjectGone(f"{uri}: no such object")
        if code in CHANGED or code in OUT_OF_RANGE:
            return ObjectGone(f"{uri}: changed since it was listed")
        return StoreError(f"{uri}: {_ADVICE.get(code, error)} ({code}{waited})")
    if isinstance(error, (*_NO_CREDENTIALS, PartialCredentialsError, SSOError)):
        return StoreError(
            f"{uri}: no usable credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            f"AWS_PROFILE, or run under a role ({type(error).__name__}{waited})"
        )
    if isinstance(error, _CONNECTION_ERRORS):
        return StoreError(
            f"{uri}: no answer from {endpoint}; check AWS_ENDPOINT_URL and the network "
            f"({type(error).__name__}{waited})"
        )
    return StoreError(f"{uri}: {error} ({type(error).__name__}{waited})")


REQUEST_ERRORS = (BotoCoreError, ClientError, Unsettled, ResponseParserError, *_LOWER_LAYERS)
"""Every error of a request, whether it may pass or not."""
