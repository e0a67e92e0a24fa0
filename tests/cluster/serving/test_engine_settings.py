"""Settings of an engine that comes from elsewhere, as command lines write them."""

from __future__ import annotations

import importlib.util

import pytest

from cluster.errors import UsageError
from cluster.serving.application import endpoint
from cluster.serving.engine_settings import check_vllm, gpus_of, parse_options


def test_options_have_the_type_that_they_look_like() -> None:
    options = parse_options(["tensor_parallel_size=2", "enforce_eager=true", "quantization=fp8"])
    assert options == {"tensor_parallel_size": 2, "enforce_eager": True, "quantization": "fp8"}


@pytest.mark.parametrize("pair", ["quantization", "=fp8", "a b=1", "quantization="])
def test_an_option_without_name_or_value_is_refused(pair: str) -> None:
    with pytest.raises(UsageError, match="write NAME=VALUE"):
        parse_options([pair])


def test_a_model_that_is_split_takes_so_many_gpus() -> None:
    assert gpus_of({}) == 1
    assert gpus_of({"tensor_parallel_size": 4}) == 4


def test_an_option_that_would_break_a_promise_is_refused_with_the_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_vllm({"quantization": "fp8"})
    with pytest.raises(UsageError, match="a row's seconds be unknown"):
        check_vllm({"async_scheduling": True})


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed_is_refused_with_what_to_type() -> None:
    with pytest.raises(UsageError, match=r"pip install 'sppruner\[vllm\]'"):
        check_vllm({})
    with pytest.raises(UsageError, match="vLLM is not installed"):
        endpoint({"model": "tiny-llava", "engine": "vllm"})


def test_an_endpoint_knows_no_other_engine() -> None:
    with pytest.raises(UsageError, match="write vllm"):
        endpoint({"model": "tiny-llava", "engine": "other"})
