"""A stand-in for lmms-eval 0.7's documented interface, used if lmms-eval is not installed."""

from __future__ import annotations

import abc
import importlib.util
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

if importlib.util.find_spec("lmms_eval") is None:

    class Lmms(abc.ABC):
        is_simple = True

        def __init__(self) -> None:
            self._rank, self._world_size = 0, 1
            self.cache_hook = CacheHook()
            self.task_dict: dict[str, Any] = {}

        @abc.abstractmethod
        def loglikelihood(self, requests: Any) -> Any: ...

        @abc.abstractmethod
        def generate_until(self, requests: Any) -> Any: ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests: Any) -> Any: ...

        @classmethod
        def create_from_arg_string(cls, text: str, additional_config: Any = None) -> Any:
            pairs = (pair.split("=") for pair in text.split(","))
            settings = {k: v for k, v in (additional_config or {}).items() if v is not None}
            return cls(**{name: value for name, value in pairs}, **settings)

    class CacheHook:
        def add_partial(self, attribute: str, request: Any, result: Any) -> None:
            """Caches nothing."""

    @dataclass
    class TokenCounts:
        input_tokens: int | None = None
        output_tokens: int | None = None

    @dataclass
    class GenerationResult:
        text: str
        token_counts: TokenCounts | None = None

    @dataclass
    class Instance:
        request_type: str
        arguments: tuple[Any, ...]
        idx: int
        metadata: dict[str, Any] = field(default_factory=dict)

        @property
        def args(self) -> tuple[Any, ...]:
            return self.arguments

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None

    def module(name: str, **members: Any) -> None:
        stand_in = ModuleType(name)
        vars(stand_in).update(members)
        sys.modules[name] = stand_in

    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        module(name, __path__=[])
    module("lmms_eval.api.model", lmms=Lmms)
    module(
        "lmms_eval.api.instance",
        GenerationResult=GenerationResult,
        Instance=Instance,
        TokenCounts=TokenCounts,
    )
    module("lmms_eval.models.registry_v2", ModelManifest=ModelManifest)
