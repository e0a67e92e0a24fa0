"""How a replica builds its engine. Imports no torch: drivers handle these settings too."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, cast

from cluster.errors import UsageError
from sppruner.engine.interface import DTYPES, Engine
from sppruner.errors import SpecError
from sppruner.spec import OptionValue, parse_value

VLLM: Final = "sppruner.integrations.vllm.engine:VllmEngine"
"""The factory of an engine that drives vLLM."""

# Slots where the settings give none. More make a CPU no faster; a GPU becomes faster as far as
# its memory has room for their keys and values, which its engine checks.
_CPU_SLOTS: Final = 16
_GPU_SLOTS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What a replica serves, and how."""

    model: str
    """Folder or Hub name."""
    revision: str | None = None
    """Content hash or commit that the model must have; None for what is there."""
    slots: int | None = None
    """Requests answered at once; None: as many as suit the replica's device."""
    engine: str = "sppruner.engine:open_engine"
    """The factory, "module:callable". It is called with model, device, dtype, slots, revision (if
    set) and `options`."""
    device: str = "auto"
    """A torch device; auto is the replica's accelerator if it has one, else the CPU."""
    dtype: str = "auto"
    """Of the weights; auto is bfloat16 on a GPU and float32 on a CPU."""
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    """More arguments of the factory."""
    first_step_seconds: float = 600.0
    """Longest silence of the engine in its first steps, which compile and allocate, before the
    replica counts as hung and is killed."""
    step_seconds: float = 120.0
    """The same for later steps, or 20 times the slowest step so far where that is longer."""

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise UsageError(f"slots {self.slots}: give at least 1")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r}: use one of {', '.join(DTYPES)}")
        if not (self.first_step_seconds > 0 and self.step_seconds > 0):
            raise UsageError("first_step_seconds and step_seconds: give seconds above 0")
        if self.engine.count(":") != 1:
            raise UsageError(f"engine {self.engine!r}: write it as module:callable")

    def sized(self, *, gpu: bool) -> EngineSettings:
        """These settings with a number of slots, for a replica with or without a GPU."""
        return replace(self, slots=self.slots or default_slots(gpu=gpu))

    def build(self) -> Engine:
        """Imports the factory and calls it. The settings must be `sized`. Raises what it raises."""
        assert self.slots is not None
        module, name = self.engine.split(":")
        factory = getattr(importlib.import_module(module), name)
        pinned = {} if self.revision is None else {"revision": self.revision}
        settings = dict(model=self.model, device=self.device, dtype=self.dtype, **pinned)
        return cast(Engine, factory(slots=self.slots, **settings, **self.options))


def check_vllm(options: Mapping[str, OptionValue]) -> None:
    """Raises UsageError where vLLM is not installed, or for an option that its engine does not
    take."""
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "engine vllm: vLLM is not installed here; pip install 'sppruner[vllm]', on every node"
        )
    from sppruner.integrations.vllm.vllm_options import check_options

    try:
        check_options(options)
    except SpecError as error:
        raise UsageError(str(error)) from error


def parse_options(pairs: Iterable[str]) -> dict[str, OptionValue]:
    """Options of an engine as a command line writes them: NAME=VALUE. Raises UsageError."""
    options: dict[str, OptionValue] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name.isidentifier() or not value:
            raise UsageError(f"engine option {pair!r}: write NAME=VALUE")
        options[name] = parse_value(value)
    return options


def gpus_of(options: Mapping[str, OptionValue]) -> int:
    """GPUs of a replica, on a cluster that has any: vLLM spreads one model over several."""
    return max(1, int(options.get("tensor_parallel_size", 1)))


def default_slots(*, gpu: bool) -> int:
    """Slots of a replica whose settings give none."""
    return _GPU_SLOTS if gpu else _CPU_SLOTS
