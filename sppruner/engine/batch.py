"""The reference engine: static batches through `generate`, each row under its own spec."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from sppruner.chat import ask_about
from sppruner.engine.base import ModelEngine, both_ways, check_length, failed
from sppruner.engine.types import Generation, Request, Result
from sppruner.spec import DENSE


class BatchEngine(ModelEngine):
    """Answers lists of requests, a batch at a time.

    Greedy requests with the same generation settings share a batch whatever their specs are;
    sampled ones run alone, so that a seed gives the same text in any company. Control requests
    form batches of their own and run twice, pruned and dense, in alternating order.
    """

    def run(self, requests: list[Request]) -> list[Result]:
        """Answers every request, in order; a bad request becomes an error result."""
        results: dict[int, Result] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            alone = i if request.generation.temperature > 0 else -1
            policy = None if request.spec.is_dense else request.spec.positions
            key = (request.generation, request.control, bool(request.images), policy, alone)
            groups.setdefault(key, []).append(i)
        for members in groups.values():
            for start in range(0, len(members), self.max_batch_rows):
                chunk = members[start : start + self.max_batch_rows]
                batch = [requests[i] for i in chunk]
                answer = self._control if batch[0].control else self._answer
                results.update(zip(chunk, answer(batch), strict=True))
        return [results[i] for i in range(len(requests))]

    def _control(self, batch: list[Request]) -> list[Result]:
        dense = [replace(request, spec=DENSE) for request in batch]
        return both_ways(batch, dense, self._answer, key=batch[0].id)

    def _answer(self, batch: list[Request]) -> list[Result]:
        """One batch; if it fails as a whole its halves are tried, down to single rows, so that a
        bad row is the only one to become an error and most neighbours still share a batch."""
        try:
            return self._generate(batch)
        except torch.AcceleratorError:
            raise  # A faulted device answers nothing more: the engine is broken, not a row.
        except Exception as error:  # The row boundary: whatever a row provokes stays with the row.
            if len(batch) > 1:
                half = len(batch) // 2
                return self._answer(batch[:half]) + self._answer(batch[half:])
            return [failed(batch[0], error)]

    def _generate(self, batch: list[Request]) -> list[Result]:
        started = time.perf_counter()
        inputs = ask_about(
            self._processor,
            [request.prompt for request in batch],
            [request.images for request in batch],
            [request.system for request in batch],
        ).to(self._model.device)
        generation = batch[0].generation
        specs = [request.spec for request in batch]
        check_length(int(inputs["attention_mask"].sum(dim=1).max()), generation, self._context)
        if generation.temperature > 0:
            torch.manual_seed(generation.seed)
        generated = self._pruner.generate(
            inputs,
            specs,
            [request.prompt for request in batch],
            **self._generate_kwargs(generation),
        )
        rows = generated.tokens_BT.tolist()
        seconds = (time.perf_counter() - started) / len(batch)
        return [
            self._result(request, report, tokens, seconds, text=self._cut(tokens, generation))
            for request, report, tokens in zip(batch, generated.reports, rows, strict=True)
        ]

    def _cut(self, tokens: list[int], generation: Generation) -> str | None:
        """The text in front of a stop string, or None where none was said."""
        if not generation.stop:
            return None
        said = self._processor.tokenizer.decode(tokens, skip_special_tokens=True)
        found = [at for stop in generation.stop if (at := said.find(stop)) >= 0]
        return said[: min(found)] if found else None

    def _generate_kwargs(self, generation: Generation) -> dict[str, Any]:
        # A generated placeholder would be read as a visual token later: never emit one.
        common: dict[str, Any] = {
            "max_new_tokens": generation.max_new_tokens,
            "suppress_tokens": self._pruner.adapter.placeholder_ids,
        }
        if generation.stop:
            common |= {
                "stop_strings": list(generation.stop),
                "tokenizer": self._processor.tokenizer,
            }
        if generation.temperature == 0:
            return common | {"do_sample": False}
        return common | {
            "do_sample": True,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "top_k": 0,
        }
