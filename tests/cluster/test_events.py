"""Events in words: every kind has a phrase, and a kind of another version is not hidden."""

from __future__ import annotations

from cluster.events import RunEvent, describe_events


def test_every_kind_has_a_phrase_in_singular_and_plural() -> None:
    for kind in RunEvent:
        for count in (1, 7):
            phrase = describe_events({kind: count})
            assert str(count) in phrase
            assert kind.value not in phrase


def test_events_are_told_in_one_line_and_nothing_is_told_of_none() -> None:
    happened = {"store_waited": 40, "replica_died": 2, "row_quarantined": 1, "call_resent": 0}
    assert describe_events(happened) == ("2 replicas died, 1 row quarantined, store away for 40 s")
    assert describe_events({}) == ""


def test_a_kind_of_another_version_is_shown_by_name() -> None:
    assert describe_events({"moon_eclipsed": 3}) == "moon_eclipsed 3"
