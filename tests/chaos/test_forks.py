"""The codes of forked processes: a number that the system gives out twice is two processes."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import cast

from tests.chaos.forks import Forks


def test_a_process_does_not_have_the_code_of_an_earlier_one_with_its_number() -> None:
    reading, writing = os.pipe()
    forks = Forks()
    forks._codes, forks._started, forks._partial = {}, [], b""

    def say(*message: object) -> None:
        os.write(writing, json.dumps(message).encode() + b"\n")

    with os.fdopen(reading, "rb", 0) as stdout:
        forks._process = cast("object", SimpleNamespace(stdout=stdout))  # type: ignore[assignment]
        say("started", 7)
        assert forks.code(7) is None
        say("ended", 7, 3)
        assert forks.code(7) == 3
        say("started", 7)
        assert forks.code(7) is None
        say("ended", 7, 0)
        assert forks.code(7) == 0
    os.close(writing)
