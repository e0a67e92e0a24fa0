"""What the model says it kept: there behind every cache, and its lack is an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sppruner.cost import ImageShape
from sppruner.integrations.vllm.image_reports import ImageReport, ReportBook
from sppruner.spec import Budget, PruneSpec
from tests.sppruner.integrations.vllm.requests import facts, questions

TOPK = PruneSpec(method="topk", budget=Budget(ratio=0.2))


def report(tokens: int) -> ImageReport:
    return ImageReport(
        tokens=tokens,
        kept_tokens=b"\x01",
        selection_flops=7,
        shape=ImageShape(tiles=1, rows=2, columns=2, tokens=tokens),
    )


def test_a_report_is_the_same_behind_the_wire() -> None:
    assert ImageReport.from_wire(report(4).to_wire()) == report(4)


def test_the_book_forgets_what_was_not_used_for_longest() -> None:
    book = ReportBook(most=2)
    book.write("a", report(1))
    book.write("b", report(2))
    assert book.read("a") == report(1)
    book.write("c", report(3))
    assert (book.read("a"), book.read("b")) == (report(1), None)


def test_the_book_counts_how_often_the_tower_ran() -> None:
    book = ReportBook()
    book.write("a", report(1))
    book.write("a", report(1))
    assert book.read("a") == replace(report(1), encoded=2)


def test_a_row_from_warm_caches_is_proved_as_the_first_one(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava", enable_prefix_caching=True)
    requests = questions(4, TOPK)
    cold, warm = engine.run(requests), engine.run(requests)
    assert [facts(result) for result in warm] == [facts(result) for result in cold]
    assert not any(result.cost.flops_cached for result in cold)
    assert all(result.cost.flops_cached["vision"] for result in warm)


def test_a_row_without_a_report_is_an_error(
    open_vllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_vllm("tiny-llava")
    monkeypatch.setattr(ReportBook, "read", lambda self, key: None)
    results = engine.run(questions(2, TOPK))
    assert {result.error_code for result in results} == {"pruning_no_effect"}


@pytest.mark.parametrize("isolates", [True, False])
def test_other_tokens_than_the_prompt_has_places_for_are_an_error(
    isolates: bool,
    open_vllm: Callable[..., Any],
    one_engine: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM itself would take the first ones without a word. Where nobody reads reports, the model
    stops."""
    engine = open_vllm("tiny-llava", enable_prefix_caching=False)
    from sppruner import selection
    from sppruner.integrations.vllm import pruning_model

    def too_many(images: Any, specs: Any, selectors: Any, layers: Any) -> Any:
        found = schedules(images, specs, selectors, layers)
        return [replace(schedule, before=schedule.before + 1) for schedule in found]

    schedules = selection.token_schedules
    monkeypatch.setattr(pruning_model, "token_schedules", too_many)
    (served,) = engine._llm.apply_model(lambda model: model)
    monkeypatch.setattr(served, "isolates", isolates)
    requests = questions(1, replace(TOPK, budget=Budget(ratio=0.15)))
    if isolates:
        (result,) = engine.run(requests)
        assert "places for" in str(result.error_message)
        return
    with pytest.raises(Exception, match="places for"):
        engine.run(requests)
    one_engine.close()
