"""Every name of vLLM that the plugin overrides or calls is there: a new version fails with a list,
not with wrong answers."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

from sppruner.integrations.vllm import ARCHITECTURES


def stock_of(served_by: str) -> tuple[type[Any], type[Any]]:
    """The plugin's class, and the class of vLLM that it stands in front of."""
    module, name = served_by.split(":")
    ours = getattr(importlib.import_module(f"sppruner.integrations.vllm.{module}"), name)
    stock = next(c for c in ours.__mro__ if c.__module__.startswith("vllm.model_executor.models."))
    return ours, stock


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vllm_serves_the_architecture_by_the_class_in_front_of_which_ours_stands(
    architecture: str,
) -> None:
    from vllm.model_executor.models.registry import _VLLM_MODELS

    _, stock = stock_of(ARCHITECTURES[architecture])
    module, name = _VLLM_MODELS[architecture][:2]
    assert (stock.__module__.rpartition(".")[2], stock.__name__) == (module, name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_methods_of_a_model_that_are_overridden_exist(architecture: str) -> None:
    ours, stock = stock_of(ARCHITECTURES[architecture])
    for method in ("embed_multimodal", "embed_input_ids", "forward", "get_language_model"):
        assert callable(getattr(stock, method, None)), f"{stock.__name__}.{method}"
    parameters = inspect.signature(ours.__init__).parameters
    assert {"vllm_config", "prefix"} <= set(parameters), "vLLM looks for these by name"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_methods_of_a_processor_that_are_overridden_exist(architecture: str) -> None:
    from vllm.multimodal.processing import BaseMultiModalProcessor

    from sppruner.integrations.vllm.pruning_processor import PruningProcessor

    missing = [
        name
        for name, value in vars(PruningProcessor).items()
        if inspect.isfunction(value)
        and name not in ("_check_items", "_words", "_shortened")
        and not hasattr(BaseMultiModalProcessor, name)
    ]
    assert not missing


def test_the_runner_calls_what_kept_positions_need() -> None:
    """By name, in the source: no other way tells before a model is loaded."""
    from vllm.v1.worker import gpu_model_runner

    source = inspect.getsource(gpu_model_runner)
    for call in (
        "get_mrope_input_positions(",
        ".embed_input_ids(",
        ".embed_multimodal(",
        "mrope_position_delta",
        "self.mrope_positions.gpu[:, :num_input_tokens]",
    ):
        assert call in source, call


def test_the_hook_that_vllm_calls_for_a_configuration_is_there() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from sppruner.integrations.vllm import register

    register()
    register()
    for architecture in ARCHITECTURES:
        hook = MODELS_CONFIG_MAP[architecture]
        assert hook.hooked_by_sppruner
        assert sum(getattr(c, "__name__", "") == "Hook" for c in hook.__mro__) == 1
    assert callable(VerifyAndUpdateConfig.verify_and_update_config)
