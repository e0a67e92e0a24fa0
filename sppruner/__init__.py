"""Visual-token pruning for Hugging Face vision-language models.

    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from sppruner import Budget, Pruner, PruneSpec, build_inputs

    name, prompt = "llava-hf/llava-1.5-7b-hf", "What is in the image?"
    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name)
    pruner = Pruner(model, tokenizer=processor.tokenizer)
    inputs = build_inputs(processor, [prompt], [Image.open("photo.jpg")])
    spec = PruneSpec(method="sppruner", budget=Budget(ratio=0.222))
    answer = pruner.generate(inputs, spec, [prompt], max_new_tokens=32)
    print(processor.batch_decode(answer.tokens_BT, skip_special_tokens=True)[0])
    print(answer.reports[0].visual_tokens_kept, "of", answer.reports[0].visual_tokens)

Imports torch and transformers only: no Ray, no object store, no HTTP. Both load when a name that
needs them is first used, so a process that only passes specs on starts without them.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from sppruner.errors import SpprunerError
from sppruner.spec import DENSE, Budget, PruneSpec

if TYPE_CHECKING:
    from sppruner.prompts import build_inputs
    from sppruner.pruner import Generated, Prepared, Pruner
    from sppruner.selectors import available
    from sppruner.types import PruneReport, Selection, VisualTokens

# The module that defines each name which is loaded on first use.
_HOMES = {
    "Generated": "sppruner.pruner",
    "Prepared": "sppruner.pruner",
    "PruneReport": "sppruner.types",
    "Pruner": "sppruner.pruner",
    "Selection": "sppruner.types",
    "VisualTokens": "sppruner.types",
    "build_inputs": "sppruner.prompts",
    "available": "sppruner.selectors",
}

__all__ = [
    "DENSE",
    "Budget",
    "Generated",
    "Prepared",
    "PruneReport",
    "PruneSpec",
    "Pruner",
    "Selection",
    "SpprunerError",
    "VisualTokens",
    "available",
    "build_inputs",
]


def __getattr__(name: str) -> Any:
    if name == "ask_about":
        warnings.warn(
            "sppruner.ask_about is now sppruner.build_inputs", DeprecationWarning, stacklevel=2
        )
        name = "build_inputs"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
