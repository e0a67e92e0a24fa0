"""The cost of a staged generation layer by layer, modelled and counted: FLOPs and KV bytes."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from sppruner import Budget, Pruner, PruneSpec
from sppruner.stages import StageDriver
from tests.sppruner.families import FAMILIES

NEW = 5
SPECS = {
    "fastv": PruneSpec(method="fastv", budget=Budget(ratio=0.25), options={"layer": 2}),
    "pyramiddrop": PruneSpec(
        method="pyramiddrop", budget=Budget(ratio=0.125), options={"layers": "2"}
    ),
    "pre+mid": PruneSpec(
        method="sppruner",
        budget=Budget(ratio=0.5),
        options={"mode": "pre+mid", "relevance": "none"},
    ),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_modelled_cost_of_each_layer_is_the_counted_one(family: str, spec: PruneSpec) -> None:
    # The counter knows no CPU kernel of fused attention and would count 0.
    pruner = Pruner(FAMILIES[family].build("eager"))
    cost = pruner.adapter.cost()
    prepared = pruner.prepare(FAMILIES[family].batch([1]), spec)
    (report,) = prepared.reports
    tokens = report.layer_tokens
    assert min(tokens) < max(tokens)
    assert prepared.stages is not None
    counter = FlopCounterMode(display=False)
    with StageDriver(pruner.adapter, prepared.stages), counter:
        output = pruner.model.generate(
            **prepared.inputs,
            max_new_tokens=NEW,
            do_sample=False,
            suppress_tokens=[2, FAMILIES[family].image_id],
            return_dict_in_generate=True,
        )

    stage_scored = spec.method == "pyramiddrop"
    scoring = report.selection_flops if stage_scored else 0  # of the others: before the decoder
    assert scoring == (cost.decoder.scoring(tokens) if stage_scored else 0)
    row = cost.row(
        images=report.image_shapes,
        layer_tokens=tokens,
        prompt_tokens_dense=report.prompt_tokens_dense,
        new_tokens=NEW,
        pruner_flops=scoring,
    )
    modelled = sum(row.flops[part] for part in ("pruner", "prefill", "decode"))
    assert counter.get_total_flops() == modelled

    decoder = pruner.adapter.language_model()
    path = next(name for name, module in pruner.model.named_modules() if module is decoder)
    counts = counter.get_flop_counts()
    for layer, held in enumerate(tokens):
        expected = cost.decoder.layer(held, held)
        expected += sum(cost.decoder.layer(1, held + step) for step in range(1, NEW))
        # Scores are read in the layer before a stage, or computed with the stage's layer.
        pair = tokens[max(0, layer - 1) : layer + 1] if stage_scored else tokens[layer : layer + 2]
        expected += cost.decoder.stages(pair) + (cost.decoder.scoring(pair) if stage_scored else 0)
        module = f"{type(pruner.model).__name__}.{path}.layers.{layer}"
        assert sum(counts[module].values()) == expected

    held_bytes = [
        tensor.numel() * tensor.element_size()
        for layer in output.past_key_values.layers
        for tensor in (layer.keys, layer.values)
    ]
    assert row.kv_bytes == sum(held_bytes)
    assert [layer.keys.shape[2] for layer in output.past_key_values.layers] == [
        held + NEW - 1 for held in tokens
    ]


def test_only_a_drop_of_tokens_inside_the_decoder_is_charged_to_the_pruner() -> None:
    cost = Pruner(FAMILIES["llava"].build()).adapter.cost()
    width = cost.decoder.heads * cost.decoder.head_dim

    def pruner_flops(*layer_tokens: int) -> int:
        row = cost.row(
            images=[],
            layer_tokens=layer_tokens,
            prompt_tokens_dense=20,
            new_tokens=1,
            pruner_flops=7,
        )
        assert row.flops_dense["pruner"] == 0
        return row.flops["pruner"]

    assert pruner_flops(12, 12, 12) == 7
    assert pruner_flops(12, 12, 5) == 7 + 2 * width * 12
    assert pruner_flops(12, 8, 5) == 7 + 2 * width * (12 + 8)
