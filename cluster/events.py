"""What happens to a run besides rows: deaths, retries and waits, counted for people.

Events are telemetry. They end in the attempt's part of the summary and decide nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, TypeAlias


class RunEvent(StrEnum):
    """The kinds of events. A value is what summaries and `/v1/runs` hold, so values are stable."""

    REPLICA_DIED = "replica_died"
    CALL_RESENT = "call_resent"
    CALL_TIMED_OUT = "call_timed_out"
    ROW_QUARANTINED = "row_quarantined"
    INFER_RETRIED = "infer_retried"
    UNIT_DEFERRED = "unit_deferred"
    UNIT_REREAD = "unit_reread"
    UNIT_MOVED = "unit_moved"
    COMMIT_LOST = "commit_lost"
    STORE_WAITED = "store_waited"
    REPLICAS_WAITED = "replicas_waited"


IN_SECONDS: Final = frozenset({RunEvent.STORE_WAITED, RunEvent.REPLICAS_WAITED})
"""Kinds that are counted in seconds. Many processes wait for one thing: a second counts once."""

OnEvent: TypeAlias = Callable[[RunEvent, int], None]
"""Told of an event and how often it happened. It must be picklable and must not raise."""


def ignore_event(kind: RunEvent, count: int) -> None:
    """An `OnEvent` outside a run."""


_PHRASES: Mapping[str, tuple[str, str]] = {
    RunEvent.REPLICA_DIED: ("{n} replica died", "{n} replicas died"),
    RunEvent.CALL_RESENT: ("{n} call sent again", "{n} calls sent again"),
    RunEvent.CALL_TIMED_OUT: ("{n} call timed out", "{n} calls timed out"),
    RunEvent.ROW_QUARANTINED: ("{n} row quarantined", "{n} rows quarantined"),
    RunEvent.INFER_RETRIED: ("{n} failed row asked again", "{n} failed rows asked again"),
    RunEvent.UNIT_DEFERRED: ("{n} unit put off", "{n} units put off"),
    RunEvent.UNIT_REREAD: ("{n} unit read again elsewhere", "{n} units read again elsewhere"),
    RunEvent.UNIT_MOVED: (
        "{n} unit moved to another node, its own lacks the mount",
        "{n} units moved to another node, their own lacks the mount",
    ),
    RunEvent.COMMIT_LOST: (
        "{n} unit labelled twice, the first copy counts",
        "{n} units labelled twice, the first copies count",
    ),
    # Counted in seconds.
    RunEvent.STORE_WAITED: ("store away for {n} s", "store away for {n} s"),
    RunEvent.REPLICAS_WAITED: ("no replica for {n} s", "no replica for {n} s"),
}


def describe_events(counts: Mapping[str, int]) -> str:
    """{"replica_died": 2, "store_waited": 40} → "2 replicas died, store away for 40 s"; empty for
    none. Unknown kinds, of another version, are shown by name."""
    known = [kind for kind in _PHRASES if counts.get(kind)]
    phrases = [_PHRASES[kind][counts[kind] != 1].format(n=counts[kind]) for kind in known]
    unknown = sorted(kind for kind in counts if kind not in _PHRASES and counts[kind])
    return ", ".join(phrases + [f"{kind} {counts[kind]}" for kind in unknown])
