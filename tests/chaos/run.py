"""One run under its schedule, from the corpus to the verdict."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from cluster.errors import RunError
from cluster.output.audit import audit
from cluster.output.run_output import RunOutput
from tests.chaos.corpus import draw_corpus
from tests.chaos.drivers import Drivers
from tests.chaos.faults import Stage, Undo, strike
from tests.chaos.ground import Ground
from tests.chaos.history import Finding
from tests.chaos.judge import DONE, DONE_WITH_ERRORS, check_run
from tests.chaos.places import LocalPlace, Place, S3Place
from tests.chaos.processes import titles
from tests.chaos.schedule import PlannedFault, Schedule

STUCK_SECONDS: Final = 120.0
"""A run is stuck that commits nothing for so long after its last fault."""
_RUN_SECONDS: Final = 420.0
_MOST_ATTEMPTS: Final = 10
_TARGET_SECONDS: Final = 40.0
_TICK_SECONDS: Final = 0.1
_RESTART_SECONDS: Final = 1.0
_SETTLE_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How one run went."""

    schedule: Schedule
    """What was planned."""
    findings: list[Finding]
    """The broken promises."""
    seconds: float
    """Wall time, without the preparation of the cluster."""
    attempts: int
    """Invocations of the command."""
    missed: list[str]
    """Faults that never found their target, or came after the end."""
    idle: list[str]
    """Faults that happened and met nothing: an outage in which nothing was asked."""

    def line(self) -> str:
        """For people: a verdict, the figures, the schedule, and what was found."""
        harms = sorted({finding.harm for finding in self.findings})
        verdict = "+".join(harms) or "ok"
        missed = f" (missed: {' '.join(self.missed)})" if self.missed else ""
        missed += f" (met nothing: {' '.join(self.idle)})" if self.idle else ""
        attempts = f"{self.attempts} attempt" + "s" * (self.attempts != 1)
        found = "".join(f"\n    {finding.harm}: {finding.text}" for finding in self.findings[:6])
        return (
            f"seed {self.schedule.seed}: {verdict}, {self.seconds:.0f} s, {attempts}; "
            f"{self.schedule.summary()}{missed}{found}"
        )


@dataclass(slots=True, kw_only=True)
class _Pending:
    """Faults that wait for progress, for a target or for their end."""

    waiting: list[PlannedFault]
    since: float | None = None
    ends: list[tuple[float, PlannedFault, Undo]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    last: float = 0.0

    def advance(self, commits: int, stage: Stage, now: float) -> None:
        """Strikes what is due, and ends what has lasted."""
        for end in [end for end in self.ends if end[0] <= now]:
            self.ends.remove(end)
            self._undo(*end[1:])
            self.last = now
        while self.waiting and self.waiting[0].after <= commits:
            fault = self.waiting[0]
            self.since = self.since or now
            undo = strike(fault, stage)
            if undo is None and now - self.since < _TARGET_SECONDS:
                return
            self.waiting.pop(0)
            self.since = None
            self.last = time.monotonic()
            if undo is None:
                self.missed.append(fault.name)
            else:
                self.ends.append((self.last + fault.seconds, fault, undo))

    def end(self) -> None:
        """Ends what is still on, and gives up the rest."""
        for _, fault, undo in self.ends:
            self._undo(fault, undo)
        self.ends.clear()
        self.missed += [fault.name for fault in self.waiting]
        self.waiting.clear()

    def _undo(self, fault: PlannedFault, undo: Undo) -> None:
        if undo() is False:
            self.idle.append(fault.name)


def check_audit(objects: Mapping[str, bytes]) -> list[Finding]:
    """What the project's own audit finds in an output, which should be nothing."""
    with TemporaryDirectory() as folder:
        for key, data in objects.items():
            place = Path(folder, key)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        try:
            found = audit(RunOutput.open(folder))
        except RunError as error:
            return [Finding(harm="wrong", text=f"audit: {error}")]
    return [
        Finding(harm="wrong", text=f"audit: {one.where}: {one.what}") for one in found.differences
    ]


def run_schedule(
    schedule: Schedule, ground: Ground, *, keep: Path | None = None, patience: float = 1.0
) -> Report:
    """Carries out one run and judges it. keep: a folder for logs, requests and the output.
    patience: multiplies the seconds after which a run is stuck, for a machine with other work."""
    corpus = draw_corpus(schedule.corpus, schedule.seed)
    ground.prepare(schedule.nodes, attached=schedule.attached)
    logs = ground.folder / f"seed-{schedule.seed}"
    logs.mkdir()
    began = time.monotonic()
    with _open_place(schedule, ground) as place:
        place.put_corpus(corpus.files)
        drivers = Drivers(schedule, ground, place, logs)
        draw = random.Random(f"faults:{schedule.seed}")
        stage = Stage(ground=ground, place=place, drivers=drivers, draw=draw)
        pending = _Pending(waiting=list(schedule.faults))
        try:
            findings = _watch(stage, pending, patience)
        except BaseException:
            if keep is not None:  # an interrupted run has logs too
                shutil.copytree(logs, keep / f"seed-{schedule.seed}", dirs_exist_ok=True)
            raise
        finally:
            pending.end()
            drivers.end_all()
        ground.proxy.settle()
        time.sleep(_SETTLE_SECONDS)  # writes of killed drivers may still arrive
        writes, objects = place.writes(), place.objects()
        findings += check_run(corpus, objects, writes, drivers.attempts)
        findings += check_audit(objects)
        report = Report(
            schedule=schedule,
            findings=findings,
            seconds=time.monotonic() - began,
            attempts=len(drivers.attempts),
            missed=pending.missed,
            idle=pending.idle + stage.unused(),
        )
        if findings:
            ground.spoil()
        if keep is not None:
            _keep(keep / f"seed-{schedule.seed}", report, ground, objects, logs)
    shutil.rmtree(logs, ignore_errors=True)
    return report


@contextmanager
def _open_place(schedule: Schedule, ground: Ground) -> Iterator[Place]:
    ground.forget_objects()
    ground.proxy.begin(seed=schedule.seed, rate=schedule.request_faults)
    place: Place
    if schedule.store == "s3":
        place = S3Place(f"seed-{schedule.seed}", ground.server.endpoint, ground.proxy)
    else:
        small = any(fault.kind == "full_disk" for fault in schedule.faults)
        place = LocalPlace(ground.folder / f"place-{schedule.seed}", small_disk=small)
    try:
        yield place
    finally:
        place.close()


def _watch(stage: Stage, pending: _Pending, patience: float) -> list[Finding]:
    """Starts the command, lets faults happen, starts it again where it ended, until it is done."""
    drivers = stage.drivers
    began = progress = ended = time.monotonic()
    commits, done = 0, False
    drivers.start()
    while True:
        time.sleep(_TICK_SECONDS)
        now = time.monotonic()
        seen = stage.place.commits()
        if seen > commits:
            commits, progress = seen, now
        if not done:
            pending.advance(commits, stage, now)
        for attempt in drivers.poll(stage.place.commits):
            done = done or attempt.code in (DONE, DONE_WITH_ERRORS)
            ended = progress = time.monotonic()
        if done:
            pending.end()  # a stopped driver goes on, and must do no harm
            if not drivers.any_left:
                return []
        elif not drivers.running and now - ended > _RESTART_SECONDS:
            if len(drivers.attempts) >= _MOST_ATTEMPTS:
                return []  # the judge says so
            drivers.start()
            progress = now
        quiet = now - max(progress, pending.last)
        if quiet > patience * STUCK_SECONDS or now - began > patience * _RUN_SECONDS:
            text = f"{commits} units, nothing for {quiet:.0f} s; {now - began:.0f} s in all"
            return [Finding(harm="stuck", text=text)]


def _keep(
    folder: Path, report: Report, ground: Ground, objects: dict[str, bytes], logs: Path
) -> None:
    """Writes everything that is known of a run."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(logs, folder)
    (folder / "report.txt").write_text(report.line() + "\n")
    (folder / "schedule.json").write_text(report.schedule.to_json() + "\n")
    with (folder / "requests.jsonl").open("w") as file:
        for exchange in ground.proxy.exchanges():
            record = asdict(exchange)
            record["body"] = len(exchange.body)
            file.write(json.dumps(record) + "\n")
    for key, body in objects.items():
        target = folder / "output" / key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(body)
    workers = "\n".join(f"{pid} {title}" for pid, title in titles(ground.raylets()).items())
    (folder / "workers.txt").write_text(workers + "\n")
    source = ground.session_logs()
    if source.is_dir():
        shutil.copytree(source, folder / "ray", ignore_dangling_symlinks=True, dirs_exist_ok=True)
