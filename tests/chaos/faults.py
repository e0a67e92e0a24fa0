"""What each kind of fault does. A fault whose target is not there yet is tried again later."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

from tests.chaos.drivers import Drivers
from tests.chaos.ground import Ground
from tests.chaos.places import LocalPlace, Place
from tests.chaos.processes import find_workers, send
from tests.chaos.schedule import PlannedFault

Undo: TypeAlias = Callable[[], object]
"""Ends a fault; returns False where the fault met nothing meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What faults strike."""

    ground: Ground
    """Cluster, server and proxy."""
    place: Place
    """Corpus and output."""
    drivers: Drivers
    """The command's processes."""
    draw: random.Random
    """Chooses among equals."""

    def unused(self) -> list[str]:
        """Faults that lie ready for whatever comes first, and that nothing came for."""
        kinds = [file.name.partition("-")[0] for file in self.ground.signals.iterdir()]
        hung = ["hung_requests"] if self.ground.proxy.hangs else []
        return [f"engine_{kind}s" for kind in kinds] + hung


def strike(fault: PlannedFault, stage: Stage) -> Undo | None:
    """Lets a fault happen; what ends it, or None where its target is not there (yet)."""
    return _STRIKES[fault.kind](stage)


def _kill(role: str) -> Callable[[Stage], Undo | None]:
    def act(stage: Stage) -> Undo | None:
        found = find_workers(role, stage.ground.raylets())
        return _nothing if found and send(stage.draw.choice(found), signal.SIGKILL) else None

    return act


def _pause(stage: Stage) -> Undo | None:
    """Stops a replica; its end lets it go on."""
    found = find_workers("replica", stage.ground.raylets())
    if not found:
        return None
    pid = stage.draw.choice(found)
    return partial(_go_on, pid) if send(pid, signal.SIGSTOP) else None


def _signal_driver(name: str) -> Callable[[Stage], Undo | None]:
    return lambda stage: _nothing if stage.drivers.send_current(name) else None


def _stop_driver(stage: Stage) -> Undo | None:
    pid = stage.drivers.stop_current(start_another=True)
    return None if pid is None else partial(_go_on, pid)


def _suspend_driver(stage: Stage) -> Undo | None:
    """As a laptop that sleeps: nobody takes over, and the driver's leases lapse."""
    pid = stage.drivers.stop_current(start_another=False)
    return None if pid is None else partial(_go_on, pid)


def _start_second(stage: Stage) -> Undo | None:
    if not stage.drivers.running:
        return None
    stage.drivers.start(beside=True)
    return _nothing


def _kill_node(stage: Stage) -> Undo | None:
    """Kills a node; its end brings another, as where machines are reclaimed and replaced."""
    return stage.ground.add_node if stage.ground.kill_node(stage.draw) else None


def _kill_head(stage: Stage) -> Undo | None:
    """The head dies with every node and, as a submitted job's, the driver; a new cluster comes."""
    if not stage.drivers.send_current("KILL"):
        return None
    stage.drivers.begin_trouble()
    stage.ground.remove_cluster()
    stage.ground.start_cluster()
    stage.drivers.end_trouble()
    return _nothing


def _engine_signal(kind: str) -> Callable[[Stage], Undo | None]:
    def act(stage: Stage) -> Undo | None:
        (stage.ground.signals / f"{kind}-{stage.draw.random()}").touch()
        return _nothing

    return act


def _outage(stage: Stage) -> Undo | None:
    proxy = stage.ground.proxy
    proxy.start_outage(stage.draw.choice(("reset", "slow_down", "error_500")))
    return proxy.stop_outage


def _hang_requests(stage: Stage) -> Undo | None:
    """Two of them may meet one command in its first request, for which it has half a minute."""
    stage.drivers.begin_trouble()
    stage.ground.proxy.hang_next(stage.draw.choice((1, 2)))
    return stage.drivers.end_trouble


def _fill_disk(stage: Stage) -> Undo | None:
    place = stage.place
    if not isinstance(place, LocalPlace) or not place.disk_is_small:
        return None
    place.fill()
    return place.free


def _nothing() -> None:
    """The end of a fault that is over at once."""


def _go_on(pid: int) -> None:
    """Lets a process go on, unless it is gone."""
    send(pid, signal.SIGCONT)


_STRIKES: Final[dict[str, Callable[[Stage], Undo | None]]] = {
    "kill_replica": _kill("replica"),
    "kill_labeller": _kill("labeller"),
    "kill_reader": _kill("reader"),
    "kill_writer": _kill("writer"),
    "kill_controller": _kill("controller"),
    "kill_janitor": _kill("janitor"),
    "kill_serve_controller": _kill("serve_controller"),
    "kill_driver": _signal_driver("KILL"),
    "term_driver": _signal_driver("TERM"),
    "stop_driver": _stop_driver,
    "suspend_driver": _suspend_driver,
    "second_driver": _start_second,
    "kill_node": _kill_node,
    "kill_head": _kill_head,
    "pause_replica": _pause,
    "stop_replica": _pause,
    "engine_raises": _engine_signal("raise"),
    "engine_hangs": _engine_signal("hang"),
    "outage": _outage,
    "hung_requests": _hang_requests,
    "full_disk": _fill_disk,
}
