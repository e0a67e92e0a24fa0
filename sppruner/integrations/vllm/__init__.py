"""Visual-token pruning inside vLLM, as a plugin: `pip install sppruner` beside vLLM is enough.

    llm.generate({"prompt": …, "multi_modal_data": {"image": …}, "mm_processor_kwargs": {
        "prune": {"method": "sppruner", "budget": {"ratio": 0.222}}}})

Every process of vLLM calls `register`, which puts a class of this package in place of vLLM's own
for each architecture that can be pruned. A request without `prune` runs the code of vLLM's class.
"""

from __future__ import annotations

from typing import Final

ARCHITECTURES: Final = {
    "LlavaForConditionalGeneration": "pruned_llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "pruned_anyres:PrunedLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "pruned_anyres:PrunedLlavaOnevision",
    "InternVLForConditionalGeneration": "pruned_tiles:PrunedInternVL",
    "Idefics3ForConditionalGeneration": "pruned_tiles:PrunedIdefics3",
    "SmolVLMForConditionalGeneration": "pruned_tiles:PrunedSmolVLM",
    "Qwen2VLForConditionalGeneration": "pruned_qwen_vl:PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "pruned_qwen_vl:PrunedQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "pruned_qwen_vl:PrunedQwen3VL",
}
"""vLLM's name of each architecture → the module and class that serve it."""


def register() -> None:
    """The entry point `vllm.general_plugins`. Classes are imported when a model is loaded."""
    from vllm import ModelRegistry

    from sppruner.integrations.vllm.settings import hook_configs

    for architecture, served_by in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{served_by}")
    hook_configs(ARCHITECTURES)
