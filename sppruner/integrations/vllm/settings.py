"""What the plugin knows of a model before it is loaded: whether it can be pruned, how, and the spec
of requests that name none.

vLLM calls a hook for each architecture when it has put a configuration together, in the process
that starts the engine. What the hook finds goes into the model's own config, which every other
process gets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from sppruner.adapters import capabilities
from sppruner.capabilities import Capabilities
from sppruner.errors import MissingSignal, SpecError, UnsupportedModel
from sppruner.integrations.vllm.wire import PRUNE
from sppruner.resolved_spec import ResolvedSpec, resolve_spec
from sppruner.spec import DENSE, PruneSpec

_ATTRIBUTE: Final = "sppruner"
_M_ROPE: Final = "mrope_section"
# The only way in which vLLM cuts the images of LLaVA-OneVision.
_ASPECTS: Final = "anyres_max_9"
# Offsets of kept tokens travel as two digits of this base, see `positions`.
_MOST_TOKENS: Final = 128**2


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginSettings:
    """The plugin's part of a model's config."""

    refused: str | None = None
    """Why no request can be pruned; None where they can."""

    keeps: bool = False
    """Whether the model takes kept tokens at their positions in the unpruned prompt."""

    default: PruneSpec = DENSE
    """The spec of requests that name none."""

    @classmethod
    def of(cls, hf_config: Any) -> PluginSettings:
        """Those that the hook put into a model's config. Raises UnsupportedModel where it was not
        called: vLLM then has other names for its hooks."""
        record = getattr(hf_config, _ATTRIBUTE, None)
        if record is None:
            raise UnsupportedModel(
                "vLLM did not call the plugin's configuration hook: this version of sppruner does "
                "not know this version of vLLM"
            )
        return cls(
            refused=record["refused"],
            keeps=record["keeps"],
            default=PruneSpec.from_dict(record["default"]),
        )

    def put_into(self, hf_config: Any) -> None:
        """Writes these settings to a model's config."""
        record = {
            "refused": self.refused,
            "keeps": self.keeps,
            "default": self.default.to_dict(),
        }
        setattr(hf_config, _ATTRIBUTE, record)

    def resolve(self, spec: PruneSpec, can: Capabilities, *, counted: bool = False) -> ResolvedSpec:
        """The spec with its method. counted: whether the images are counted before their prompt is
        planned. Raises what `resolve_spec` raises, and SpecError or MissingSignal for what cannot
        run inside vLLM."""
        if not spec.is_dense:
            if self.refused is not None:
                raise SpecError(f"this model is served without pruning: {self.refused}")
            if not counted:
                _check_budget(spec)
            if spec.positions == "keep" and not self.keeps:
                raise MissingSignal(
                    "positions 'keep' need a pipeline of one stage and no micro-batches in vLLM: "
                    "start it so, or ask for positions 'renumber'"
                )
        resolved = resolve_spec(spec, can)
        if resolved.selector is not None and resolved.selector.staged:
            raise SpecError(
                f"method {spec.method!r} prunes inside the decoder, where vLLM holds one length of "
                "KV cache for all layers: choose a method that prunes before it, such as 'sppruner'"
            )
        return resolved


def is_counted(spec: PruneSpec) -> bool:
    """Whether what an image keeps depends on more than its size."""
    return not spec.is_dense and bool(spec.budget.spread or spec.budget.scope == "prompt")


def _check_budget(spec: PruneSpec) -> None:
    if spec.budget.spread:
        raise SpecError(
            "a budget with spread depends on what the image shows, and vLLM plans a prompt's "
            "length before it is seen: leave spread out, or use VllmEngine, which counts first"
        )
    if spec.budget.scope == "prompt":
        raise SpecError(
            "vLLM caches images one by one, so an image's budget cannot depend on the others: use "
            "scope 'image', or VllmEngine, which counts first"
        )


def check_spec(spec: PruneSpec, can: Capabilities) -> None:
    """Raises what `PluginSettings.resolve` raises for a spec that no vLLM can run on such a
    model."""
    PluginSettings(keeps=True).resolve(spec, can, counted=True)


def check_tokens(tokens: int) -> None:
    """Raises SpecError for an image of more visual tokens than kept positions can express."""
    if tokens > _MOST_TOKENS:
        raise SpecError(
            f"an image of {tokens} visual tokens: at most {_MOST_TOKENS} can be pruned with "
            "positions 'keep'; ask for positions 'renumber'"
        )


def hook_configs(architectures: Iterable[str]) -> None:
    """Makes vLLM call `configure` for these architectures, after its own hook if it has one."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    for architecture in architectures:
        own = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if getattr(own, "hooked_by_sppruner", False):  # a process may load its plugins twice
            continue

        class Hook(own):  # type: ignore[misc, valid-type]
            hooked_by_sppruner = True

            @classmethod
            def verify_and_update_config(cls, vllm_config: Any) -> None:
                super().verify_and_update_config(vllm_config)
                configure(vllm_config)

        MODELS_CONFIG_MAP[architecture] = Hook


def configure(vllm_config: Any) -> None:
    """Puts the settings into the model's config. Raises SpecError for a default spec that the model
    cannot run; a model that cannot be pruned is served densely and says why when it is asked."""
    model = vllm_config.model_config
    hf_config = model.hf_config
    default = _take_default(model.multimodal_config)
    try:
        can = capabilities(hf_config)
        refused = _refusal(vllm_config)
    except UnsupportedModel as error:
        can, refused = None, str(error)
    keeps = refused is None and _sees_every_token(vllm_config)
    if can is not None and keeps and "renumber" in can.positions:
        # 1-D positions: vLLM then lets the model make them, and hands on three equal rows.
        setattr(hf_config, _M_ROPE, [1, 1, 1])
    settings = PluginSettings(refused=refused, keeps=keeps, default=default)
    if can is None or refused is not None:
        if not default.is_dense:
            raise SpecError(f"this model cannot be pruned: {refused}. Leave {PRUNE!r} out")
    else:
        settings.resolve(default, can)
    settings.put_into(hf_config)


def _take_default(multimodal: Any) -> PruneSpec:
    """The server's default spec, which no processor of transformers may see."""
    kwargs = dict(multimodal.mm_processor_kwargs or {}) if multimodal is not None else {}
    spec = kwargs.pop(PRUNE, None)
    if spec is None:
        return DENSE
    multimodal.mm_processor_kwargs = kwargs or None
    return PruneSpec.from_dict(spec)


def _refusal(vllm_config: Any) -> str | None:
    hf_config = vllm_config.model_config.hf_config
    aspects = getattr(hf_config, "vision_aspect_ratio", _ASPECTS)
    if aspects != _ASPECTS:
        return (
            f"its vision_aspect_ratio is {aspects!r}, and vLLM cuts images as {_ASPECTS!r} has it"
        )
    compilation = vllm_config.compilation_config
    multimodal = vllm_config.model_config.multimodal_config
    if compilation.compile_mm_encoder or compilation.cudagraph_mm_encoder:
        return (
            "its vision tower is compiled or captured, and then nothing can be read from it: start "
            "vLLM without compile_mm_encoder and cudagraph_mm_encoder"
        )
    if multimodal is not None and multimodal.mm_encoder_tp_mode == "data":
        return (
            "its vision tower deals images out to ranks: start vLLM without mm_encoder_tp_mode=data"
        )
    return None


def _sees_every_token(vllm_config: Any) -> bool:
    """Whether the process that embeds a step's tokens also runs all decoder layers on all of them
    at once."""
    parallel = vllm_config.parallel_config
    return parallel.pipeline_parallel_size == 1 and not parallel.use_ubatching
