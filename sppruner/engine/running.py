"""The requests that are being answered: read into slots together, then a token each per step."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sppruner.engine.asking import Asked
from sppruner.engine.decode import DecodeStep
from sppruner.engine.encodings import Encodings
from sppruner.engine.prefill import Prefilled, prefill
from sppruner.engine.prefixes import Prefixes
from sppruner.engine.sampling import Choice, Chooser
from sppruner.engine.slots import SlotCache
from sppruner.engine.transcript import Transcript
from sppruner.pruner import Pruner
from sppruner.types import PruneReport


@dataclass(slots=True, eq=False, kw_only=True)
class Row:
    """One request on its way. seconds: its share of the steps it took part in, each step's wall
    seconds divided by its rows. positions: of the token that was chosen last."""

    asked: Asked
    report: PruneReport
    choice: Choice
    positions: list[int]
    transcript: Transcript | None
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    unsaid: str = ""

    @property
    def need(self) -> list[int]:
        """Tokens of its slot at each layer in the end, at most."""
        new = self.asked.request.generation.max_new_tokens
        return [tokens + new for tokens in self.report.layer_tokens]

    @property
    def lost(self) -> list[int] | None:
        """By how much it stands further in front at each layer, where stages renumber."""
        tokens = self.report.layer_tokens
        if self.report.spec.positions == "keep" or tokens[-1] == tokens[0]:
            return None
        return [tokens[0] - held for held in tokens]

    @property
    def stopped(self) -> bool:
        """Whether it said a stop string."""
        return self.transcript is not None and self.transcript.stopped


class RunningRows:
    """At most `slots` rows; row i holds slot i of the cache.

    ends: ids that end an answer. encodings, prefixes: of earlier prompts. Control requests, which
    are read twice to be timed, neither look there nor leave anything.
    """

    def __init__(
        self,
        pruner: Pruner,
        tokenizer: Any,
        *,
        ends: Collection[int],
        slots: int,
        encodings: Encodings,
        prefixes: Prefixes,
        capacity: int | None = None,
        kv_bytes: int | None = None,
        compiled: bool = False,
    ) -> None:
        text = pruner.model.config.get_text_config()
        heads = text.num_attention_heads
        self.rows: list[Row] = []
        self.cache = SlotCache(
            layers=text.num_hidden_layers,
            slots=slots,
            heads=getattr(text, "num_key_value_heads", None) or heads,
            width=getattr(text, "head_dim", None) or text.hidden_size // heads,
            dtype=pruner.model.dtype,
            device=pruner.model.device,
            capacity=capacity,
            limit=kv_bytes,
        )
        self._pruner = pruner
        self._tokenizer = tokenizer
        self._encodings = encodings
        self._prefixes = prefixes
        self._ends = frozenset(ends)
        self._device = pruner.model.device
        self._decode = DecodeStep(pruner.adapter, compiled=compiled)
        # A captured step has one shape: slots that nobody holds run along.
        self._shape = slots if compiled else None
        self._chooser = Chooser(
            pruner.model.generation_config, pruner.adapter.placeholder_ids, pruner.model.device
        )

    @property
    def free(self) -> int:
        return self.cache.slots - len(self.rows)

    def fits(self, group: Sequence[Asked]) -> bool:
        """Whether the cache has room for a group beside those that run, to their last token."""
        needs = [max(row.need) for row in self.rows] + [asked.need for asked in group]
        return self.cache.fits(len(needs), max(needs))

    @torch.inference_mode()
    def read(self, group: Sequence[Asked]) -> list[Row]:
        """Reads prompts and says the first token of each; returns those that are finished by it.

        Raises what a prompt of them provokes, and then none has been taken.
        """
        started = time.perf_counter()
        anew = group[0].alone or self._encodings.limit == 0
        known = () if anew else (self._encodings, self._prefixes)
        prompts = prefill(self._pruner, group, *known)
        rows = [self._row(asked, prompt) for asked, prompt in zip(group, prompts, strict=True)]
        finished = self._say(torch.stack([prompt.logits_V for prompt in prompts]), rows)
        stay = [
            (row, prompt) for row, prompt in zip(rows, prompts, strict=True) if row not in finished
        ]
        if stay:
            # What memory is missing is missing here, while none of them has a slot.
            needs = [row.need for row in (*self.rows, *(row for row, _ in stay))]
            self.cache.prepare(len(needs), [max(layer) for layer in zip(*needs, strict=True)])
        for row, prompt in stay:
            self.cache.write(len(self.rows), prompt.keys, prompt.values)
            self.rows.append(row)
        _share(rows, started)
        return finished

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """One more token for every row; returns those that are finished by it, and lets them go."""
        started = time.perf_counter()
        rows = list(self.rows)
        idle = 0 if self._shape is None else self._shape - len(rows)
        tokens = [row.tokens[-1] for row in rows] + [0] * idle
        positions = [row.positions for row in rows] + [[0] * len(rows[0].positions)] * idle
        logits_NV = self._decode(
            torch.tensor(tokens, device=self._device),
            torch.tensor(positions, device=self._device).T.contiguous(),
            self.cache,
            self._lost(rows, idle),
        )[: len(rows)]
        self.cache.end(len(rows))
        for row in rows:
            row.positions = [position + 1 for position in row.positions]
        finished = self._say(logits_NV, rows)
        _share(rows, started)
        for row in finished:
            self.drop(row)
        return finished

    @torch.inference_mode()
    def drop(self, row: Row) -> None:
        """Lets a row go; the last one takes its slot."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        if slot != last:
            self.cache.move(last, slot)
            self.rows[slot] = self.rows[last]
        self.rows.pop()
        self.cache.release(last)

    def _lost(self, rows: Sequence[Row], idle: int) -> torch.Tensor | None:
        """See `DecodeStep`; idle: further slots that run along. A captured step gets it whether a
        row needs it or not, so that it is one graph."""
        lost = [row.lost for row in rows]
        if len(rows[0].positions) > 1 or not (any(lost) or self._shape):
            return None
        none = [0] * len(self.cache.keys)
        filled = [row or none for row in lost] + [none] * idle
        return torch.tensor(filled, device=self._device).T.contiguous()

    def _row(self, asked: Asked, prompt: Prefilled) -> Row:
        request = asked.request
        spoken = request.stream or request.generation.stop
        return Row(
            asked=asked,
            report=prompt.report,
            choice=Choice(request.generation, prompt.ids),
            positions=prompt.positions,
            transcript=Transcript(self._tokenizer, request.generation.stop) if spoken else None,
        )

    def _say(self, logits_NV: torch.Tensor, rows: Sequence[Row]) -> list[Row]:
        """Each row's next token; the rows that it ends."""
        tokens = self._chooser.choose(logits_NV, [row.choice for row in rows])
        finished = []
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
            ended = token in self._ends
            if row.transcript is not None and not ended:
                row.unsaid += row.transcript.add(token)
            full = len(row.tokens) == row.asked.request.generation.max_new_tokens
            if ended or full or row.stopped:
                finished.append(row)
                if row.transcript is not None:
                    row.unsaid += row.transcript.finish()
        return finished


def _share(rows: Sequence[Row], started: float) -> None:
    seconds = (time.perf_counter() - started) / len(rows)
    for row in rows:
        row.seconds += seconds
