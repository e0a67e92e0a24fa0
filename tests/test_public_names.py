"""The public names of each package, written out: adding or removing one is a decision, and here."""

from __future__ import annotations

import importlib
import inspect

import pytest

PUBLIC = {
    "sppruner": """
        DENSE Budget Generated Prepared PruneReport PruneSpec Pruner Selection SpprunerError
        VisualTokens available build_inputs
    """,
    "sppruner.adapters": """
        Adapter Encoded EncodedImage Idefics3Adapter InternVLAdapter Kept LlavaAdapter
        LlavaNextAdapter LlavaOnevisionAdapter Qwen2VLAdapter Qwen2_5_VLAdapter Qwen3VLAdapter
        TowerOutput adapter_class adapter_for capabilities cost_of families
    """,
    "sppruner.cost": """
        PARTS ClipTowerCost DecoderCost EncoderCost ImageShape LlavaEncoderCost ModelCost
        QwenEncoderCost RowCost SiglipTowerCost TiledEncoderCost
    """,
    "sppruner.engine": """
        BatchEngine ContinuousEngine Engine Request Result SamplingParams open_engine
    """,
    "sppruner.evaluation": """
        CAPTION FORMATS Comparison Dataset Estimate Item SpecScore UnsupportedSpec compare
        count_answers drawn_scenes method_label paired_differences read_dataset result_records
        unsupported_records
    """,
    "sppruner.selectors": "Selector available selector_for",
    "sppruner.stages": """
        LastQueryProbe StageDriver StagePlan TokenSchedule staged_static_cache
    """,
    "cluster": """
        EngineSettings FleetSettings LabellerSettings RunConfig RunOutput endpoint label_units
        open_fleet read_units run summarise unpack_rows
    """,
    "cluster.store": """
        FIRST_CONTACT_S LocalStore ObjectInfo Patience RangedFile S3Store Store open_store
    """,
}


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these_and_each_is_at_home(package: str) -> None:
    """Each name resolves, lazily imported ones too, to something defined in the package itself."""
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):  # constants do not know their home
            home = value.__module__
            assert (home + ".").startswith(package + "."), f"{package}.{name} comes from {home}"
