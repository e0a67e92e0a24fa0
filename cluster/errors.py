"""Every error of the running system.

ClusterError                     code                 retryable  stops
├── RowError                     (below)              no         one row
│   ├── ReadError                read_failed          no
│   ├── ArchiveTruncated         archive_truncated    no
│   ├── ImageMissing             image_missing        no
│   ├── ImageTooLarge            image_too_large      no
│   ├── ImageUndecodable         image_undecodable    no
│   ├── ImageTooSlow             image_too_slow       no
│   ├── PromptInvalid            prompt_invalid       no
│   ├── PruningNoEffect          pruning_no_effect    no
│   ├── InferenceFailed          inference_failed     no
│   └── PoisonRow                poison_row           no
├── ArchiveDamaged               archive_damaged      no         one row, for the archive
├── Busy                         busy                 yes        nothing: the call is sent again
├── EngineBroken                 engine_broken        yes        a replica, which is replaced
├── ApiError                     (per request)        no         one HTTP request
└── RunError                     (below)              no         the run
    ├── UsageError               usage                no         before any compute is spent
    ├── StoreError               store                no
    │   └── ObjectGone           store                no         or only the rows that needed it
    ├── SettingsChanged          settings_changed     no         refused: another run's output
    ├── FleetUnavailable         fleet_unavailable    no         no replicas to send rows to
    ├── FleetUnstable            fleet_unstable       no         replicas die and hardly answer
    ├── ErrorShareExceeded       error_share          no         too many bad rows
    ├── CommitRefused            commit_refused       no         a unit that may not be committed
    ├── RedrawDiffers            redraw_differs       no         a picture it could not back
    ├── LoadFailed               load_failed          no         a benchmark without responses
    └── Unexpected               unexpected           no         the run: no other error fits

A row error becomes an error row with its `code`, message and stage. A run error ends the command
with `exit_code` and a message that says what to type next. Codes are stable: committed rows hold
them. Errors of the library (`sppruner.errors`) carry code and stage too.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final


class ClusterError(Exception):
    """Base of the system's errors."""

    code: ClassVar[str] = "internal"
    """Stable name of the error, for rows, logs and API answers."""
    retryable: ClassVar[bool] = False
    """Whether the same call may succeed later."""


class RowError(ClusterError):
    """Fails one row and becomes data."""

    stage: ClassVar[str] = "read"
    """Where the row failed: read, decode, prompt, infer or commit."""


class ReadError(RowError):
    """The source holds the row but not in a readable form."""

    code = "read_failed"


class ArchiveTruncated(RowError):
    """A tar is damaged or ends too early; the complete samples before that are rows as usual."""

    code = "archive_truncated"


class ImageMissing(RowError):
    """The row has no image bytes."""

    code = "image_missing"
    stage = "decode"


class ImageTooLarge(RowError):
    """More bytes or pixels than the limits allow; refused before it is decoded."""

    code = "image_too_large"
    stage = "decode"


class ImageUndecodable(RowError):
    """Not an image of an allowed format, or a damaged one."""

    code = "image_undecodable"
    stage = "decode"


class ImageTooSlow(RowError):
    """Decoding it takes more CPU time than the limits allow."""

    code = "image_too_slow"
    stage = "decode"


class PromptInvalid(RowError):
    """No question where one is needed, or a prompt the model cannot take."""

    code = "prompt_invalid"
    stage = "prompt"


class PruningNoEffect(RowError):
    """The row was to be pruned and the model saw other tokens than the budget allows."""

    code = "pruning_no_effect"
    stage = "infer"


class InferenceFailed(RowError):
    """The model raised on this row alone."""

    code = "inference_failed"
    stage = "infer"


class PoisonRow(RowError):
    """The row killed, or hung, every replica that it ran on alone."""

    code = "poison_row"
    stage = "infer"


class ArchiveDamaged(ClusterError):
    """A tar is damaged or cut short; its readers turn this into an error row."""

    code = "archive_damaged"

    def __init__(self, position: int, reason: str, member: str | None = None) -> None:
        """position: byte of the archive. member: the damaged one, where it is known."""
        super().__init__(position, reason, member)
        self.position = position
        self.reason = reason
        self.member = member

    def __str__(self) -> str:
        return f"{self.reason} at byte {self.position}"


class Busy(ClusterError):
    """The replica is full for batch rows: send the call again, to another replica or later."""

    code = "busy"
    retryable = True


class EngineBroken(ClusterError):
    """The engine has ended, or fails on every row: Serve replaces the replica."""

    code = "engine_broken"
    retryable = True


_API_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(ClusterError):
    """A request that is answered with an error in OpenAI's shape."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: float = 1.0,
    ) -> None:
        """status: of HTTP. code, param: OpenAI's error code and the field at fault, or None.
        retry_after: seconds after which the same request may succeed, for status 429 and 503."""
        super().__init__(message)
        self.retry_after = retry_after
        self.status = status
        self.api_code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """The response body: `{"error": {message, type, param, code}}`."""
        kind = _API_TYPES.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.api_code}
        return {"error": error}


class RunError(ClusterError):
    """Stops the run; the command ends with `exit_code`."""

    exit_code: ClassVar[int] = 1


class UsageError(RunError):
    """A setting that cannot work, found before any compute was spent."""

    code = "usage"
    exit_code = 2


class TooManyMembers(UsageError):
    """A tar with more members than one archive may have."""


class StoreError(RunError):
    """The object store refused, is missing, or gave up after its retries."""

    code = "store"


class ObjectGone(StoreError):
    """The object is missing, or is no longer the one that was listed."""


class SettingsChanged(UsageError):
    """The output prefix belongs to a run with other settings; the message shows the difference."""

    code = "settings_changed"


class FleetUnavailable(RunError):
    """The model could not be served: the message has Ray's or the engine's reason."""

    code = "fleet_unavailable"


class FleetUnstable(RunError):
    """Replicas died, hung or answered wrongly, again and again, and answered hardly a row."""

    code = "fleet_unstable"


class ErrorShareExceeded(RunError):
    """More rows failed than `max_error_share` allows."""

    code = "error_share"
    exit_code = 4


class CommitRefused(RunError):
    """A unit that is not whole, with a value that its column cannot have, or with rows marked as
    pruned that were not."""

    code = "commit_refused"


class RedrawDiffers(RunError):
    """Selecting again did not give the tokens that a committed row says the model saw."""

    code = "redraw_differs"


class LoadFailed(RunError):
    """A request of a load benchmark got no complete response; a round without any stops it."""

    code = "load_failed"


class Unexpected(RunError):
    """Nothing that is foreseen here; the message says what was raised, and where."""

    code = "unexpected"
