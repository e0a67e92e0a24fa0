"""Every family and method: vLLM keeps the tokens that the library's own engine keeps, and says the
same. Only random weights can show it for most families, so texts are noise, but the same noise.
`--matrix FILE` writes how many answers of each are equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sppruner.engine import Request, Result, SamplingParams, open_engine
from sppruner.errors import MissingSignal, SpecError
from sppruner.selectors import available
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.sppruner.integrations.vllm.requests import facts
from tests.sppruner.integrations.vllm.wide_families import FAMILIES, write_wide_folder

ROUNDED_SHARE = 0.02
"""Most answers that may differ: features differ by rounding (by 4e-4 at most, where it was looked
at), which also depends on the images that share a call of the tower, and some methods choose token
by token, so that one comparison that falls otherwise changes all later ones. Random features have
more near ties than trained ones, of which none differs (`test_equality`)."""
BUDGETS = [Budget(ratio=0.5), Budget(tokens=3)]
SIZES = [(40, 60), (64, 64), (60, 30), (33, 47)]


def picture(number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    width, height = SIZES[number % len(SIZES)]
    noise = torch.randint(0, 256, (height // 4, width // 4, 3), generator=generator).byte()
    return Image.fromarray(noise.numpy()).resize((width, height))


def requests(spec: PruneSpec) -> list[Request]:
    return [
        Request(
            id=str(number),
            prompt=f"what is it: {number}?",
            images=(picture(number),),
            spec=spec,
            generation=SamplingParams(max_new_tokens=4),
        )
        for number in range(6)
    ]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide_folder(request.param, tmp_path_factory.mktemp("models") / request.param)


def test_every_method_keeps_what_the_engine_keeps(
    family: Path, open_vllm: Callable[..., Any], matrix: dict[tuple[str, str], str]
) -> None:
    ours, theirs = open_engine(str(family), dtype="float32"), open_vllm(str(family))
    compared: list[PruneSpec] = []
    different: list[tuple[PruneSpec, Result, Result]] = []
    answers = 0
    for method in available():
        for budget in [DENSE.budget] if method == "none" else BUDGETS:
            for positions in ("keep", "renumber"):
                spec = PruneSpec(method=method, budget=budget, positions=positions)  # type: ignore[arg-type]
                if method == "none":
                    spec = DENSE
                try:
                    ours.check(spec)
                    theirs.check(spec)
                except (SpecError, MissingSignal):
                    continue
                expected, found = ours.run(requests(spec)), theirs.run(requests(spec))
                assert not [r.error_message for r in (*expected, *found) if r.error_code], spec
                compared.append(spec)
                unequal = [
                    (spec, a, b)
                    for a, b in zip(map(facts, expected), map(facts, found), strict=True)
                    if a != b
                ]
                assert len(unequal) <= 1, f"{len(unequal)} of {len(expected)}: {unequal[0]}"
                different += unequal
                answers += len(expected)
    for method in dict.fromkeys(spec.method for spec in compared):
        specs = [spec for spec in compared if spec.method == method]
        answers_of, unequal_of = 6 * len(specs), sum(s.method == method for s, _, _ in different)
        matrix[family.name, method] = f"{answers_of - unequal_of}/{answers_of}"
    assert len({spec.method for spec in compared}) >= 10
    assert len(different) <= ROUNDED_SHARE * answers, f"{len(different)}: {different}"


def test_stages_are_refused_with_the_reason(family: Path, open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm(str(family))
    for spec, reason in [
        (PruneSpec(method="fastv", budget=Budget(ratio=0.5)), "inside the decoder"),
        (PruneSpec(method="topk", budget=Budget(ratio=0.5, spread=0.5)), "spread"),
        (
            PruneSpec(method="sppruner", budget=Budget(ratio=0.5), options={"relevance": "clip"}),
            "clip",
        ),
    ]:
        with pytest.raises((SpecError, MissingSignal), match=reason):
            engine.check(spec)
        (result,) = engine.run(requests(spec)[:1])
        assert result.error_code == "prompt_invalid"
        assert reason in (result.error_message or "")


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(ratio=0.5, spread=0.5), "spread"),
        (Budget(ratio=0.5, scope="prompt"), "scope"),
    ],
)
def test_plain_vllm_refuses_budgets_that_are_not_known_beforehand(
    budget: Budget, reason: str, family: Path, open_vllm: Callable[..., Any]
) -> None:
    engine = open_vllm(str(family))
    (request,) = requests(PruneSpec(method="prunesid", budget=budget))[:1]
    with pytest.raises(ValueError, match=reason):
        engine._vllm.renderer.render_cmpl([engine.prompt(request)])


def test_an_image_is_counted_before_its_prompt_is_planned(
    family: Path, open_vllm: Callable[..., Any]
) -> None:
    ours, theirs = open_engine(str(family), dtype="float32"), open_vllm(str(family))
    asked = requests(PruneSpec(method="prunesid", budget=Budget(ratio=0.5, spread=0.5)))
    expected, found = ours.run(asked), theirs.run(asked)
    assert not [r.error_message for r in (*expected, *found) if r.error_code]
    pairs = zip(map(facts, expected), map(facts, found), strict=True)
    assert sum(a != b for a, b in pairs) <= 1
