"""The schedule of one run, drawn from its seed: corpus, cluster, store and faults.

Faults wait for progress, a number of committed units, and not for a clock, so that a seed replays
as well as a cluster can. Faults of single requests depend on the request alone (`proxy.py`).
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from typing import Final, Literal, TypeAlias

from tests.chaos.corpus import BAD_ROWS, DAMAGES, IN_TARS, CorpusShape, Task

StoreKind: TypeAlias = Literal["s3", "local"]

UNIT_ROWS: Final = (6, 8, 12)
BATCH_SECONDS: Final = 0.15
"""Long enough that faults find a run at work."""
_KINDS: Final[dict[str, float]] = {
    "kill_replica": 4,
    "kill_labeller": 2,
    "kill_reader": 2,
    "kill_writer": 1,
    "kill_driver": 4,
    "term_driver": 2,
    "stop_driver": 2,
    "suspend_driver": 1.5,
    "second_driver": 1.5,
    "kill_controller": 2,
    "kill_janitor": 1,
    "kill_serve_controller": 1.5,
    "kill_node": 3,
    "kill_head": 0.8,
    "pause_replica": 1.5,
    "stop_replica": 1,
    "engine_raises": 2,
    "engine_hangs": 0.8,
    "outage": 3,
    "hung_requests": 0.8,
    "full_disk": 4,
}
"""Kinds of faults by weight; see `faults.py`."""
_SLOW: Final = {"kill_head", "stop_replica", "suspend_driver", "engine_hangs", "hung_requests"}
_SECONDS: Final[dict[str, tuple[float, float]]] = {
    "stop_driver": (3, 12),
    "kill_node": (1, 6),
    "suspend_driver": (65, 80),  # longer than the janitor waits for a job to be heard of
    "pause_replica": (2, 8),
    "stop_replica": (60, 90),  # longer than its watchdog waits
    "outage": (1, 9),
    "hung_requests": (60, 60),  # as long as a client waits
    "full_disk": (1, 6),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFault:
    """One fault."""

    kind: str
    """One of the kinds of `faults.py`."""
    after: int
    """Committed units that it waits for."""
    seconds: float = 0.0
    """How long it lasts; 0 where it is over at once."""

    @property
    def name(self) -> str:
        """Kind and moment."""
        return f"{self.kind}@{self.after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One run."""

    seed: int
    """Everything else follows from it."""
    corpus: CorpusShape
    """The corpus."""
    unit_rows: int
    """Rows of a unit."""
    nodes: int
    """Raylets, the head's among them."""
    replicas: int
    """Model replicas."""
    attached: bool
    """Whether an endpoint is up before the run, rather than deployed by it."""
    store: StoreKind
    """Where corpus and output lie."""
    request_faults: float
    """Share of requests to the store that fail or are late."""
    faults: tuple[PlannedFault, ...]
    """What happens to the cluster, in order of progress."""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    def summary(self) -> str:
        """A few words for people."""
        parts = [fault.name for fault in self.faults]
        bad = [*self.corpus.bad, *([self.corpus.damage] if self.corpus.damage else [])]
        rate = f" {self.request_faults:.0%} of requests" if self.request_faults else ""
        own = "attached" if self.attached else "own"
        return (
            f"{self.corpus.rows} {self.corpus.task} rows in {self.corpus.format} on {self.store}"
            f"{rate}, {self.nodes} nodes, {self.replicas} replicas {own}; "
            f"{' '.join(parts) or 'no faults'}; bad rows: {' '.join(bad) or 'none'}"
        )


def draw_schedule(seed: int) -> Schedule:
    """The schedule of a seed."""
    draw = random.Random(f"schedule:{seed}")
    store: StoreKind = "s3" if draw.random() < 0.7 else "local"
    corpus = _draw_corpus_shape(draw)
    nodes = draw.choices((1, 2, 3), (3, 3, 2))[0]
    unit_rows = draw.choice(UNIT_ROWS)
    attached = draw.random() < 0.7
    return Schedule(
        seed=seed,
        corpus=corpus,
        unit_rows=unit_rows,
        nodes=nodes,
        replicas=endpoint_replicas(nodes) if attached else draw.choice((1, 2)),
        attached=attached,
        store=store,
        request_faults=draw.choice((0.0, 0.02, 0.05)) if store == "s3" else 0.0,
        faults=_draw_faults(draw, store, nodes, corpus.rows // unit_rows),
    )


def endpoint_replicas(nodes: int) -> int:
    """Replicas of the endpoint of a cluster of so many nodes."""
    return 1 if nodes == 1 else 2


def _draw_corpus_shape(draw: random.Random) -> CorpusShape:
    parquet = draw.random() < 0.6
    task: Task = "caption" if draw.random() < 0.5 else "vqa"
    kinds = [kind for kind in (BAD_ROWS if parquet else IN_TARS) if kind != "kills"]
    if task == "caption":
        kinds = [kind for kind in kinds if "question" not in kind]
    bad = draw.sample(kinds, draw.choice((0, 0, 1, 2, 3)))
    if draw.random() < 0.06:
        bad.append("kills")  # each costs several replicas, and with them half a minute
    return CorpusShape(
        format="parquet" if parquet else "tar",
        task=task,
        rows=draw.randint(40, 160),
        files=draw.choice((1, 2, 3)),
        bad=tuple(bad),
        damage=draw.choice(DAMAGES) if not parquet and draw.random() < 0.4 else None,
    )


def _draw_faults(
    draw: random.Random, store: StoreKind, nodes: int, units: int
) -> tuple[PlannedFault, ...]:
    kinds = dict(_KINDS)
    for kind in ("outage", "hung_requests") if store == "local" else ("full_disk",):
        del kinds[kind]
    if nodes == 1:
        del kinds["kill_node"]
    faults: list[PlannedFault] = []
    for _ in range(draw.choices((0, 1, 2, 3), (1, 6, 5, 2))[0]):
        kind = draw.choices(list(kinds), list(kinds.values()))[0]
        if kind in _SLOW:
            for slow in _SLOW & kinds.keys():  # one of them takes a minute; two would take two
                del kinds[slow]
        low, high = _SECONDS.get(kind, (0.0, 0.0))
        after = draw.choice((0, 1, 2, max(1, units // 3), max(1, units // 2), max(1, units - 2)))
        seconds = round(draw.uniform(low, high), 1)
        faults.append(PlannedFault(kind=kind, after=after, seconds=seconds))
    return tuple(sorted(faults, key=lambda fault: fault.after))
