"""Names that the README of the last version showed still work, and say what replaces them."""

from __future__ import annotations

import pytest

import sppruner
import sppruner.engine
from sppruner.engine.interface import SamplingParams
from sppruner.prompts import build_inputs


def test_ask_about_is_build_inputs() -> None:
    with pytest.warns(DeprecationWarning, match="build_inputs"):
        assert sppruner.ask_about is build_inputs


def test_generation_is_sampling_params() -> None:
    with pytest.warns(DeprecationWarning, match="SamplingParams"):
        assert sppruner.engine.Generation is SamplingParams


@pytest.mark.parametrize("module", [sppruner, sppruner.engine])
def test_unknown_names_are_still_unknown(module: object) -> None:
    with pytest.raises(AttributeError, match="no attribute 'asked'"):
        module.asked  # type: ignore[attr-defined]  # noqa: B018
