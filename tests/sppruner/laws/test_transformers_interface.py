"""The parts of transformers that the library uses beyond the documented interface. A release that
changes one fails here by name, before it fails elsewhere with a wrong number."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationConfig

from sppruner.adapters import Adapter, adapter_for
from tests.sppruner.families import FAMILIES

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "sppruner"
VERSION = f"transformers {transformers.__version__}"

# Imports from inside transformers, with the arguments that they are given.
IMPORTED: dict[tuple[str, str], set[str]] = {
    # adapters/anyres.py
    ("image_processing_utils", "select_best_resolution"): {
        "original_size",
        "possible_resolutions",
    },
    # models/processors.py
    ("models.auto.processing_auto", "PROCESSOR_MAPPING"): set(),
    ("processing_utils", "ProcessorMixin"): set(),
    ("utils", "is_torchvision_available"): set(),
    # models/jpeg_scaling.py
    ("image_processing_utils", "get_patch_output_size"): {
        "image",
        "target_resolution",
        "input_data_format",
    },
    ("image_transforms", "get_resize_output_image_size"): {
        "size",
        "default_to_square",
        "input_data_format",
    },
    ("image_utils", "ChannelDimension"): set(),
    ("models.qwen2_vl.image_processing_pil_qwen2_vl", "smart_resize"): {
        "height",
        "width",
        "factor",
        "min_pixels",
        "max_pixels",
    },
    # signals.py
    ("masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"): set(),
    ("modeling_utils", "ALL_ATTENTION_FUNCTIONS"): set(),
    # stages/
    ("cache_utils", "StaticLayer"): {"max_cache_len"},
    ("masking_utils", "create_causal_mask"): {
        "config",
        "inputs_embeds",
        "attention_mask",
        "past_key_values",
        "layer_idx",
    },
    # tiny/
    ("models.clip.image_processing_pil_clip", "CLIPImageProcessorPil"): set(),
    ("models.qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"): set(),
    ("models.qwen2_5_vl.modeling_qwen2_5_vl", "apply_rotary_pos_emb_vision"): {
        "q",
        "k",
        "cos",
        "sin",
    },
}
# Private attributes of objects of transformers, and of vLLM, that are read or written.
PRIVATE = {
    "_supports_mm_encoder_outputs",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_build_llava_or_pixtral_hf_info",
}

# Of the model under `.model`: what the adapters name; probes go to the attentions.
TOWERS: dict[str, list[str]] = {
    "llava": ["vision_tower.encoder.layers.0.self_attn", "multi_modal_projector"],
    "llava_next": ["vision_tower.encoder.layers.0.self_attn", "multi_modal_projector"],
    "llava_onevision": ["vision_tower.encoder.layers.0.self_attn"],
    "internvl": ["vision_tower.encoder.layer.0.attention", "multi_modal_projector"],
    "idefics3": ["vision_model.encoder.layers.0.self_attn", "connector.modality_projection"],
    "smolvlm": ["vision_model.encoder.layers.0.self_attn", "connector.modality_projection"],
    "qwen2_vl": ["visual.blocks.0.attn", "visual.merger"],
    "qwen2_5_vl": ["visual.blocks.0.attn", "visual.merger"],
    "qwen3_vl": ["visual.blocks.0.attn", "visual.merger"],
}
# Of the object that `get_image_features` returns, besides `pooler_output`.
STATES = {
    "llava": {"hidden_states"},
    "llava_next": {"hidden_states"},
    "llava_onevision": {"hidden_states"},
    "qwen3_vl": {"last_hidden_state", "deepstack_features"},
}
QWEN = [family for family in FAMILIES if family.startswith("qwen")]
families = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def adapter_of(family: str) -> Adapter:
    return adapter_for(FAMILIES[family].build())


def parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def missing(function: Callable[..., Any], wanted: set[str]) -> str:
    """The missing parameters of a signature as a message; empty if there are none."""
    gone = wanted - parameters(function)
    name = getattr(function, "__qualname__", function)
    return f"{VERSION}: {name} has no longer {sorted(gone)}" if gone else ""


def trees(*folders: Path) -> Iterator[tuple[Path, ast.AST]]:
    for folder in folders:
        for file in folder.rglob("*.py"):
            yield file, ast.parse(file.read_text())


def test_every_import_from_inside_transformers_is_listed_here() -> None:
    inside = set()
    for file, tree in trees(SOURCES, ROOT / "jobs" / "training"):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
                module = str(node.module).removeprefix("transformers.")
                # Config classes are documented where they are defined.
                if "configuration_" not in module:
                    inside |= {(module, alias.name) for alias in node.names}
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                assert not any(name.startswith("transformers.") for name in names), file
    assert inside == set(IMPORTED)


def test_every_private_attribute_of_a_foreign_object_is_listed_here() -> None:
    found = set()
    for _, tree in trees(SOURCES):
        own = {
            node.name if isinstance(node, ast.FunctionDef) else node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.Attribute) and _of_self(node))
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                dunder = node.attr.startswith("__")
                if not dunder and not _of_self(node) and node.attr not in own:
                    found.add(node.attr)
    assert found == PRIVATE


def _of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


@pytest.mark.parametrize(("module", "name"), IMPORTED)
def test_every_import_exists_and_accepts_its_arguments(module: str, name: str) -> None:
    try:
        found = getattr(importlib.import_module(f"transformers.{module}"), name)
    except (ImportError, AttributeError):
        pytest.fail(f"{VERSION}: no transformers.{module}.{name}")
    if wanted := IMPORTED[module, name]:
        assert not missing(found, wanted), missing(found, wanted)


def test_a_registered_attention_is_found_by_its_name_and_so_is_its_mask() -> None:
    """`signals` registers through the classes and looks names up in the tables."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(*_: Any, **__: Any) -> None: ...

    for interface, table in (
        (AttentionInterface, ALL_ATTENTION_FUNCTIONS),
        (AttentionMaskInterface, ALL_MASK_ATTENTION_FUNCTIONS),
    ):
        assert "sdpa" in table, f"{VERSION}: {interface.__name__} knows no 'sdpa'"
        interface.register("sppruner_interface_test", attention)
        found = table["sppruner_interface_test"]
        assert found is attention, f"{VERSION}: {interface.__name__}.register reaches no table"
    assert "eager" in ALL_MASK_ATTENTION_FUNCTIONS, f"{VERSION}: no mask function of 'eager'"


def test_processors_are_built_by_the_methods_that_leave_videos_out() -> None:
    from transformers.processing_utils import ProcessorMixin

    for name, wanted in (
        ("get_attributes", set[str]()),
        ("from_args_and_dict", {"args", "processor_dict"}),
    ):
        method = getattr(ProcessorMixin, name, None)
        assert method is not None, f"{VERSION}: no ProcessorMixin.{name}"
        assert not missing(method, wanted), missing(method, wanted)


def test_caches_and_generation_settings_have_what_stages_and_chunks_need() -> None:
    wanted = {"query_length", "layer_idx"}
    for cache in (DynamicCache, transformers.StaticCache):
        assert not missing(cache.get_mask_sizes, wanted), missing(cache.get_mask_sizes, wanted)
    wanted = {"config", "max_cache_len"}
    assert not missing(transformers.StaticCache, wanted), missing(transformers.StaticCache, wanted)
    static = transformers.StaticCache(config=FAMILIES["llava"].build().config, max_cache_len=4)
    assert isinstance(static.layers, list), f"{VERSION}: StaticCache.layers is no list"
    assert hasattr(GenerationConfig(), "prefill_chunk_size"), f"{VERSION}: no prefill_chunk_size"


@families
def test_a_model_takes_encoder_outputs_and_makes_them(family: str) -> None:
    adapter = adapter_of(family)
    model = adapter.model
    assert hasattr(model, "_supports_mm_encoder_outputs"), f"{VERSION}: renamed on {family}"
    assert model._supports_mm_encoder_outputs()
    wanted = {"mm_encoder_outputs", "position_ids", "inputs_embeds", "attention_mask"}
    assert not missing(model.forward, wanted), missing(model.forward, wanted)
    encode = model.model.get_image_features
    wanted = {"pixel_values"} | ({"image_grid_thw"} if family in QWEN else set())
    assert not missing(encode, wanted), missing(encode, wanted)

    inputs = FAMILIES[family].batch([1, 1])
    with torch.no_grad():
        output = adapter.encode(inputs, frozenset()).output
    for name in {"pooler_output"} | STATES.get(family, {"last_hidden_state"}):
        value = getattr(output, name, None)
        assert value is not None, f"{VERSION}: {family} features without {name}"
    fields = {"pooler_output"} | ({"deepstack_features"} & output.keys())
    rebuilt = type(output)(**{name: output[name] for name in fields})
    assert set(rebuilt.keys()) == fields, f"{VERSION}: {type(output).__name__} fills fields in"


@pytest.mark.parametrize("family", QWEN)
def test_mrope_positions_come_from_token_types_and_grids(family: str) -> None:
    function = adapter_of(family).model.model.get_rope_index
    wanted = {"input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask"}
    assert not missing(function, wanted), missing(function, wanted)
    assert next(iter(inspect.signature(function).parameters)) == "input_ids"


@families
def test_towers_and_projectors_are_where_the_adapters_look(family: str) -> None:
    model = adapter_of(family).model.model
    for path in TOWERS[family]:
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            pytest.fail(f"{VERSION}: {type(model).__name__} has no {path} ({error})")
        if path.endswith(("attn", "attention")):
            file = sys.modules[type(module).__module__]
            assert hasattr(file, "eager_attention_forward"), (
                f"{VERSION}: {file.__name__} has no eager_attention_forward for its attention"
            )
    tower = model.get_submodule(TOWERS[family][0].split(".")[0])
    assert hasattr(tower.config, "_attn_implementation_internal"), (
        f"{VERSION}: {type(tower.config).__name__} has no _attn_implementation_internal"
    )


@families
def test_decoder_layers_take_what_the_stages_replace(family: str) -> None:
    """By name, in every forward: hooks of the layers see and change keyword arguments."""
    adapter = adapter_of(family)
    decoder = adapter.language_model()
    replaced = {"position_embeddings", "attention_mask", "position_ids", "past_key_values"}
    given: list[set[str]] = []
    handle = decoder.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: given.append(set(kwargs)), with_kwargs=True
    )
    adapter.model.generate(**FAMILIES[family].batch([1]), max_new_tokens=2, do_sample=False)
    handle.remove()
    for kwargs in given:
        gone = sorted(replaced - kwargs)
        assert not gone, f"{VERSION}: {type(decoder).__name__} gives its layers no {gone}"
    for layer in decoder.layers:
        assert hasattr(layer, "self_attn"), f"{VERSION}: {type(layer).__name__} has no self_attn"
    assert hasattr(decoder.config, "_attn_implementation_internal")


@families
def test_attention_functions_are_called_as_the_probes_read_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(module, query, key, value, mask, …) with heads before tokens, and a scaling by name; looked
    up by the name in the sub-model's own config, in each forward."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, seen = f"sppruner_recorder_{family}", []

    def recorder(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((query, key, kwargs))
        assert args or "attention_mask" in kwargs
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)

    AttentionInterface.register(name, recorder)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    adapter = adapter_of(family)
    tower = adapter.model.model.get_submodule(TOWERS[family][0].split(".")[0])
    inputs = FAMILIES[family].batch([1])
    for part in (tower, adapter.language_model()):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(part.config, "_attn_implementation_internal", name)
            adapter.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        who = f"{VERSION}: attention of {type(part).__name__}"
        assert seen, f"{who} does not follow _attn_implementation_internal"
        for query, key, kwargs in seen:
            assert query.dim() == key.dim() == 4, f"{who} has another layout"
            assert query.shape[1] % key.shape[1] == 0, f"{who} has tokens before heads"
            assert isinstance(kwargs.get("scaling"), float), f"{who} passes no scaling by name"
