"""The equivalence matrix: every family under pruning, each cell against plain
`generate` on the unpruned prompt.
`pytest tests/sppruner/laws/test_equivalence.py --matrix FILE` writes it as a table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sppruner.pruner
from sppruner import Budget, Pruner, PruneSpec
from sppruner.compact import compact
from sppruner.errors import MissingSignal
from sppruner.spec import DENSE, OptionValue
from tests.sppruner.families import FAMILIES, Family
from tests.sppruner.families.rows import one_row
from tests.sppruner.laws import test_staged_equivalence as stages_equivalence

NEW = 6
MIXED = [1, 2, 0]  # one image, two images, text only


@functools.cache
def model_of(name: str) -> Any:
    return FAMILIES[name].build()


def settings(family: Family, **extra: Any) -> dict[str, Any]:
    # EOS is suppressed: a finished row is padded and would compare equal for the wrong reason.
    return {
        "max_new_tokens": NEW,
        "do_sample": False,
        "suppress_tokens": [2, family.image_id],
        "return_dict_in_generate": True,
        "output_logits": True,
    } | extra


def spec(method: str, ratio: float | None = None, **budget: Any) -> PruneSpec:
    plain: dict[str, OptionValue] = {"relevance": "none", "kappa": 0.0}
    options = plain if method == "sppruner" else {}
    return PruneSpec(method=method, budget=Budget(ratio=ratio, **budget), options=options)


def logits(output: Any) -> Tensor:
    return torch.stack(output.logits, dim=1)


def kept_mask(pruner: Pruner, inputs: Any, specs: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """[B, S]: the tokens of the full prompt that the pruner's packed prompt holds."""
    seen: list[Tensor] = []

    def recording(**arguments: Any) -> Any:
        seen.append(arguments["keep_BS"])
        return compact(**arguments)

    monkeypatch.setattr(sppruner.pruner, "compact", recording)
    pruner.prepare(inputs, specs)
    monkeypatch.setattr(sppruner.pruner, "compact", compact)
    return seen[0].to(torch.int64)


def reference(pruner: Pruner, inputs: Any, keep_BS: Tensor, generate: dict[str, Any]) -> Any:
    """The full prompt with dropped tokens hidden by the mask, every token at its position."""
    positions_RBS = pruner.adapter.positions(inputs)
    return pruner.model.generate(
        **(dict(inputs) | {"attention_mask": inputs["attention_mask"] * keep_BS}),
        position_ids=positions_RBS[0] if len(positions_RBS) == 1 else positions_RBS,
        **generate,
    )


def assert_pruned_equals_masked(
    family: Family,
    images: list[int],
    specs: Any,
    monkeypatch: pytest.MonkeyPatch,
    *,
    steps: bool = True,
    **extra: Any,
) -> None:
    inputs = family.batch(images)
    pruner = Pruner(model_of(family.name))
    generate = settings(family, **extra)
    keep_BS = kept_mask(pruner, inputs, specs, monkeypatch)
    torch.manual_seed(7)
    masked = reference(pruner, inputs, keep_BS, generate)
    torch.manual_seed(7)
    pruned = pruner.generate(inputs, specs, **generate)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(pruned.tokens_BT, masked.sequences[:, width:])
    if steps:
        torch.testing.assert_close(
            logits(pruned.output), logits(masked), atol=2e-4, rtol=1e-4, msg="some step differs"
        )


def keep_all(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping every token is plain `generate`, bit for bit."""
    inputs = family.batch(MIXED)
    generate = settings(family)
    plain = model_of(family.name).generate(**inputs, **generate)
    for method in ("grid", "sppruner"):
        kept = Pruner(model_of(family.name)).generate(inputs, spec(method, 1.0), **generate)
        assert torch.equal(kept.tokens_BT, plain.sequences[:, inputs["input_ids"].shape[1] :])
        assert torch.equal(logits(kept.output), logits(plain))


def masked(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruned equals masked, logits of every step, from half of the tokens to one and to none."""
    for one in (spec("sppruner", 0.5), spec("topk", 0.22), spec("random", 0.06)):
        assert_pruned_equals_masked(family, MIXED, one, monkeypatch)
    for tokens in (1, 0):
        assert_pruned_equals_masked(family, MIXED, spec("grid", tokens=tokens), monkeypatch)


def batch_invariance(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row in a batch of mixed budgets gets the same result as in a batch of one."""
    pruner = Pruner(model_of(family.name))
    inputs = family.batch([1, 1, 2, 0])
    specs = [spec("topk", 0.5), DENSE, spec("sppruner", 0.22), spec("grid", 0.3)]
    together = pruner.generate(inputs, specs, **settings(family))
    for row, one in enumerate(specs):
        single = pruner.generate(one_row(pruner.adapter, inputs, row), one, **settings(family))
        assert torch.equal(single.tokens_BT[0], together.tokens_BT[row])
        torch.testing.assert_close(
            logits(single.output)[0], logits(together.output)[row], atol=2e-4, rtol=1e-4
        )
        assert single.reports[0] == together.reports[row]


def beams(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_pruned_equals_masked(
        family, [1, 2], spec("topk", 0.4), monkeypatch, steps=False, num_beams=3
    )


def sampling(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_pruned_equals_masked(
        family, [1, 2], spec("topk", 0.4), monkeypatch, do_sample=True, num_return_sequences=2
    )


def static_cache(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_pruned_equals_masked(
        family, MIXED, spec("topk", 0.3), monkeypatch, cache_implementation="static"
    )


def multi_image(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several images a row; a budget of the prompt, shared by its images, is met to the token."""
    for scope in ("image", "prompt"):
        one = spec("topk", tokens=5, scope=scope)
        assert_pruned_equals_masked(family, [3, 2], one, monkeypatch)
        reports = Pruner(model_of(family.name)).prepare(family.batch([3, 2]), one).reports
        kept = [report.visual_tokens_kept for report in reports]
        assert kept == ([5, 5] if scope == "prompt" else [15, 10])


def stages(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning inside the decoder, on top of pruning before it, equals masking layer by layer."""
    stages_equivalence.test_every_step_equals_the_masked_recomputation(
        family.name, stages_equivalence.HALF_INPUT, 1
    )


def renumber(family: Family, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Positions become 0, 1, 2, …; with M-RoPE this is an error."""
    pruner = Pruner(model_of(family.name))
    one = replace(spec("topk", 0.4), positions="renumber")
    inputs = family.batch(MIXED)
    if "renumber" not in pruner.adapter.capabilities.positions:
        with pytest.raises(MissingSignal, match="renumber"):
            pruner.prepare(inputs, one)
        return "cannot: M-RoPE"
    prepared = pruner.prepare(inputs, one)
    mask_BL = prepared.inputs["attention_mask"]
    counted_BL = (mask_BL.cumsum(dim=1) - 1).clamp(min=0)
    assert torch.equal(prepared.inputs["position_ids"], counted_BL)
    return None


CHECKS: dict[str, Callable[[Family, pytest.MonkeyPatch], str | None]] = {
    "keep-all = generate": keep_all,
    "pruned = masked": masked,
    "batch invariance": batch_invariance,
    "beams": beams,
    "sampling": sampling,
    "static cache": static_cache,
    "multi-image": multi_image,
    "stages": stages,
    "renumbered": renumber,
}


@pytest.mark.matrix
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_passes(
    family: str,
    check: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    cannot = CHECKS[check](FAMILIES[family], monkeypatch)
    if cannot is not None:
        record_property("cell", cannot)
