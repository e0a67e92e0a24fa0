"""The running batch: requests are prefilled into slots together, then each step decodes one more
token of every request.

Shapes: N running requests, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sppruner.engine.caches.encoder import EncoderCache
from sppruner.engine.caches.kv_slots import KVSlots
from sppruner.engine.caches.prefix import PrefixCache
from sppruner.engine.decode import DecodeStep
from sppruner.engine.detokenizer import Detokenizer
from sppruner.engine.prefill import Prefilled, prefill
from sppruner.engine.preparation import PreparedRequest
from sppruner.engine.sampler import Sampler, SamplingState
from sppruner.engine.token_logprobs import TokenLogprob, read_logprobs
from sppruner.pruner import Pruner
from sppruner.types import PruneReport


@dataclass(slots=True, eq=False, kw_only=True)
class RunningRequest:
    """A request that has been prefilled and has not ended."""

    prepared: PreparedRequest
    """The request as it was prefilled."""

    report: PruneReport
    """What was pruned of its prompt."""

    sampling: SamplingState
    """What its next token depends on besides its logits."""

    positions: list[int]
    """Position ids of the token that was sampled last, one per row of position ids."""

    detokenizer: Detokenizer | None
    """Set where its text is needed before its end: to stream it, or to find stop strings."""

    tokens: list[int] = field(default_factory=list)
    """The tokens of its answer so far."""

    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of these tokens, if it asked for them."""

    seconds: float = 0.0
    """Its share of the steps it took part in: each step's wall seconds divided by its requests."""

    first_token_at: float = 0.0
    """When its first token was sampled, by `time.perf_counter`."""

    pending_text: str = ""
    """Text that no update has carried yet."""

    images_cached: bool = False
    """Whether the features of its images were in the encoder cache."""

    suffix_tokens: int | None = None
    """Tokens behind a prefix that was in the prefix cache; None where its prompt was read whole."""

    @property
    def max_lengths(self) -> list[int]:
        """Most tokens of its slot at each layer, answer included."""
        new = self.prepared.request.generation.max_new_tokens
        return [tokens + new for tokens in self.report.layer_tokens]

    @property
    def dropped(self) -> list[int] | None:
        """Tokens that stages have dropped in front of each layer, where positions are renumbered;
        None where they are not."""
        tokens = self.report.layer_tokens
        if self.report.spec.positions == "keep" or tokens[-1] == tokens[0]:
            return None
        return [tokens[0] - held for held in tokens]

    @property
    def stopped(self) -> bool:
        """Whether its answer contains a stop string."""
        return self.detokenizer is not None and self.detokenizer.stopped


class RunningBatch:
    """At most `slots` running requests, and `reserved` more while some of them are less urgent than
    others; request i holds slot i of the KV cache. Requests are in order of priority, so that a
    step of the urgent ones is a step of the first slots.

    eos_ids: ids that end an answer. capacity, kv_bytes: see `KVSlots` (its `limit`). compiled: see
    `DecodeStep`. Caches of 0 bytes are bypassed.
    """

    def __init__(
        self,
        pruner: Pruner,
        tokenizer: Any,
        *,
        eos_ids: Collection[int],
        slots: int,
        reserved: int = 0,
        encoder_cache: EncoderCache,
        prefix_cache: PrefixCache,
        capacity: int | None = None,
        kv_bytes: int | None = None,
        compiled: bool = False,
    ) -> None:
        text = pruner.model.config.get_text_config()
        heads = text.num_attention_heads
        self.requests: list[RunningRequest] = []
        self.cache = KVSlots(
            layers=text.num_hidden_layers,
            slots=slots + reserved,
            heads=getattr(text, "num_key_value_heads", None) or heads,
            width=getattr(text, "head_dim", None) or text.hidden_size // heads,
            dtype=pruner.model.dtype,
            device=pruner.model.device,
            capacity=capacity,
            limit=kv_bytes,
        )
        self.slots = slots
        """Requests that run at the same time where all are equally urgent."""
        self._pruner = pruner
        self._tokenizer = tokenizer
        self._encoder_cache = encoder_cache
        self._prefix_cache = prefix_cache
        self._eos_ids = frozenset(eos_ids)
        self._device = pruner.model.device
        self._decode = DecodeStep(pruner.adapter, compiled=compiled)
        # A compiled step has one shape, so free slots are decoded too.
        self._padded_slots = slots + reserved if compiled else None
        self._sampler = Sampler(
            pruner.model.generation_config, pruner.adapter.placeholder_ids, pruner.model.device
        )

    def free_slots(self, priority: int) -> int:
        """Slots for more requests of a priority."""
        above = any(running.prepared.priority > priority for running in self.requests)
        return max(0, (self.cache.slots if above else self.slots) - len(self.requests))

    @property
    def priorities(self) -> list[int]:
        """Of the requests, in order."""
        return [running.prepared.priority for running in self.requests]

    def fits(self, group: Sequence[PreparedRequest]) -> bool:
        """Whether the KV cache has memory for a group beside the running requests, up to the last
        token of each."""
        lengths = [max(running.max_lengths) for running in self.requests]
        lengths += [prepared.max_length for prepared in group]
        return self.cache.fits(len(lengths), max(lengths))

    @property
    def kv_usage(self) -> float | None:
        """Share of the KV cache that the running requests may come to need; None for no bound."""
        longest = max((max(running.max_lengths) for running in self.requests), default=0)
        return self.cache.share(len(self.requests), longest)

    @torch.inference_mode()
    def prefill(self, group: Sequence[PreparedRequest]) -> list[RunningRequest]:
        """Prefills a group and samples the first token of each; returns the requests that end with
        it.

        Raises what any of the prompts provokes; then none of the group holds a slot.
        """
        started = time.perf_counter()
        cached = self._encoder_cache.limit > 0
        caches = (self._encoder_cache, self._prefix_cache) if cached else ()
        prompts = prefill(self._pruner, group, *caches)
        joining = [self._start(*pair) for pair in zip(group, prompts, strict=True)]
        finished = self._append_tokens(torch.stack([p.logits_V for p in prompts]), joining)
        now = time.perf_counter()
        for running in joining:
            running.first_token_at = now
        staying = [
            (running, prompt)
            for running, prompt in zip(joining, prompts, strict=True)
            if running not in finished
        ]
        if staying:
            # The only allocation, so memory runs out here, while none of the group holds a slot.
            lengths = [r.max_lengths for r in (*self.requests, *(r for r, _ in staying))]
            longest = [max(layer) for layer in zip(*lengths, strict=True)]
            self.cache.reserve(len(lengths), longest)
        for running, prompt in staying:
            slot = self._make_room(running)
            self.cache.write(slot, prompt.keys, prompt.values)
        _share_seconds(joining, started)
        return finished

    @torch.inference_mode()
    def step(self, requests: Sequence[RunningRequest]) -> list[RunningRequest]:
        """Decodes one more token of some of the running requests; removes and returns those that
        end with it. The others keep what they have. Raises what the model raises; then none has
        changed."""
        started = time.perf_counter()
        if any(one is not other for one, other in zip(requests, self.requests, strict=False)):
            stepping = set(requests)
            self._arrange([*requests, *(one for one in self.requests if one not in stepping)])
        padding = 0 if self._padded_slots is None else self._padded_slots - len(requests)
        tokens = [running.tokens[-1] for running in requests] + [0] * padding
        no_positions = [0] * len(requests[0].positions)
        positions = [running.positions for running in requests] + [no_positions] * padding
        logits_NV = self._decode(
            torch.tensor(tokens, device=self._device),
            torch.tensor(positions, device=self._device).T.contiguous(),
            self.cache,
            self._dropped(requests, padding),
        )[: len(requests)]
        self.cache.end_step(len(requests))
        for running in requests:
            running.positions = [position + 1 for position in running.positions]
        finished = self._append_tokens(logits_NV, requests)
        _share_seconds(requests, started)
        for running in finished:
            self.remove(running)
        return finished

    @torch.inference_mode()
    def sort(self) -> None:
        """Puts urgent requests first again, after steps of some that were not the first."""
        self._arrange(sorted(self.requests, key=lambda running: running.prepared.priority))

    @torch.inference_mode()
    def remove(self, running: RunningRequest) -> None:
        """Frees a request's slot; the last one of its priority moves into it, into whose slot the
        last one of the next priority does."""
        slot, last = self.requests.index(running), len(self.requests) - 1
        for end in self._group_ends():
            if end > slot:
                self._move(end, slot)
                slot = end
        self.requests.pop()
        self.cache.release(last)

    def _make_room(self, joining: RunningRequest) -> int:
        """The slot of a request that joins: the first ones of each larger priority move behind
        the last."""
        slot = len(self.requests)
        self.requests.append(joining)
        starts = [0, *(end + 1 for end in self._group_ends())]
        for start in reversed(starts[:-1]):
            if self.requests[start].prepared.priority > joining.prepared.priority:
                self._move(start, slot)
                slot = start
        self.requests[slot] = joining
        return slot

    def _group_ends(self) -> list[int]:
        """The index of the last request of each run of one priority."""
        priorities = self.priorities
        last = len(priorities) - 1
        return [i for i, p in enumerate(priorities) if i == last or priorities[i + 1] != p]

    def _arrange(self, order: Sequence[RunningRequest]) -> None:
        """Gives requests the slots of their places in `order`."""
        for slot, running in enumerate(order):
            if (source := self.requests.index(running)) != slot:
                self.cache.swap(source, slot)
                self.requests[source], self.requests[slot] = self.requests[slot], running

    def _move(self, source: int, target: int) -> None:
        self.cache.move(source, target)
        self.requests[target] = self.requests[source]

    def _dropped(self, requests: Sequence[RunningRequest], padding: int) -> torch.Tensor | None:
        """`dropped_LN` of `DecodeStep`. padding: empty slots that are computed with the full ones.
        With one row of positions a captured step always gets it, so that it is one graph."""
        dropped = [running.dropped for running in requests]
        one_row = len(requests[0].positions) == 1
        if not one_row or not (any(dropped) or self._padded_slots):
            return None
        none = [0] * len(self.cache.keys)
        filled = [row or none for row in dropped] + [none] * padding
        return torch.tensor(filled, device=self._device).T.contiguous()

    def _start(self, prepared: PreparedRequest, prompt: Prefilled) -> RunningRequest:
        request = prepared.request
        needs_text = request.stream or request.generation.stop
        return RunningRequest(
            prepared=prepared,
            report=prompt.report,
            # A copy: a prefill that fails for another request is done again.
            sampling=SamplingState(
                request.generation, prompt.ids, prepared.guide and prepared.guide.copy()
            ),
            positions=prompt.positions,
            images_cached=prompt.images_cached,
            suffix_tokens=prompt.suffix_tokens,
            detokenizer=(
                Detokenizer(self._tokenizer, request.generation.stop) if needs_text else None
            ),
        )

    def _append_tokens(
        self, logits_NV: torch.Tensor, requests: Sequence[RunningRequest]
    ) -> list[RunningRequest]:
        """Samples each request's next token; returns the requests that end with it."""
        tokens = self._sampler.sample(logits_NV, [running.sampling for running in requests])
        finished = []
        for row, (running, token) in enumerate(zip(requests, tokens, strict=True)):
            if running.sampling.failure is not None:
                finished.append(running)
                continue
            wanted = running.prepared.request.logprobs
            if wanted is not None and token not in self._eos_ids:
                read = read_logprobs(self._tokenizer, logits_NV[row], token, wanted)
                running.logprobs.append(read)
            try:
                ended = self._append(running, token)
            except Exception as error:  # The row boundary: its slot has the token already.
                running.sampling.failure, ended = error, True
            if ended:
                finished.append(running)
        return finished

    def _append(self, running: RunningRequest, token: int) -> bool:
        """Whether the request ends with this token."""
        running.tokens.append(token)
        guide = running.sampling.guide
        ended = token in self._eos_ids or (guide is not None and guide.ended)
        if running.detokenizer is not None and not ended:
            running.pending_text += running.detokenizer.add(token)
        full = len(running.tokens) == running.prepared.request.generation.max_new_tokens
        if not (ended or full or running.stopped):
            return False
        if running.detokenizer is not None:
            running.pending_text += running.detokenizer.finish()
        return True


def _share_seconds(requests: Sequence[RunningRequest], started: float) -> None:
    seconds = (time.perf_counter() - started) / len(requests)
    for running in requests:
        running.seconds += seconds
