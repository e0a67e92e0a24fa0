"""Settings of a request are refused when they are made, before any engine meets them."""

from __future__ import annotations

from typing import Any

import pytest

from sppruner.engine import SamplingParams
from sppruner.errors import SpecError


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_invalid_generation_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        SamplingParams(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 2.5},
        {"max_new_tokens": float("nan")},
        {"max_new_tokens": "5"},
        {"max_new_tokens": True},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-320},
        {"temperature": None},
        {"top_p": float("nan")},
        {"seed": 1.5},
        {"seed": 2**64},
        {"stop": "red"},
        {"stop": (None,)},
        {"stop": 3},
        {"stop": ("x" * 1001,)},
        {"stop": ("x",) * 17},
    ],
)
def test_settings_that_no_sampler_could_run_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_a_list_of_stop_strings_is_a_tuple() -> None:
    assert SamplingParams(stop=["a", "b"]) == SamplingParams(stop=("a", "b"))  # type: ignore[arg-type]
