"""What can be done with any engine: answer a list of requests, warm up."""

from __future__ import annotations

from typing import Final, Protocol

from PIL import Image

from sppruner.engine.interface import Request, Result, SamplingParams, Update
from sppruner.errors import EngineError, PruningHadNoEffect
from sppruner.spec import DENSE, Budget, PruneSpec

_WARM_UP_REQUESTS: Final = 4


class Answers(Protocol):
    """The part of an `Engine` that answering needs."""

    model_id: str
    slots: int

    def submit(self, request: Request) -> int:
        """See `Engine`."""
        ...

    def step(self) -> bool:
        """See `Engine`."""
        ...

    def poll(self) -> list[Update]:
        """See `Engine`."""
        ...


def answer_all(engine: Answers, requests: list[Request]) -> tuple[list[Result], list[Update]]:
    """The result of every request, in order, from an engine that nobody else steps; and the updates
    of requests that were submitted before."""
    tickets = [engine.submit(request) for request in requests]
    results: dict[int, Result] = {}
    ours, others = set(tickets), list[Update]()
    while len(results) < len(tickets):
        engine.step()
        for update in engine.poll():
            if update.ticket not in ours:
                others.append(update)
            elif update.result is not None:
                results[update.ticket] = update.result
    return [results[ticket] for ticket in tickets], others


def blank_request(number: int, spec: PruneSpec = DENSE) -> Request:
    """A request that every engine can answer. number: gives its image a colour of its own, since
    equal images would be encoded once."""
    return Request(
        id=str(number),
        prompt="warm up",
        images=(Image.new("RGB", (64, 64), (64 + number,) * 3),),
        spec=spec,
        generation=SamplingParams(max_new_tokens=2),
    )


def warm_up(engine: Answers) -> None:
    """Answers blank images, dense and pruned, so that first allocations and kernel choices are
    over. Raises PruningHadNoEffect where the model ignores a selection, before a corpus has cost
    anything, and EngineError where it cannot answer at all."""
    half = PruneSpec(method="sppruner", budget=Budget(ratio=0.5))
    for spec in (DENSE, half):
        rows = range(min(_WARM_UP_REQUESTS, engine.slots))
        requests = [blank_request(number, spec) for number in rows]
        for result in answer_all(engine, requests)[0]:
            if result.error_code == PruningHadNoEffect.code:
                raise PruningHadNoEffect(str(result.error_message))
            if result.error_code is not None:
                raise EngineError(f"{engine.model_id} cannot answer: {result.error_message}")
