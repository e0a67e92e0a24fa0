"""Leases: whatever jobs do, a held fleet stays and a fleet that nobody holds goes."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.serving.leases import Leases

PATIENCE = 60.0
FLEETS = st.sampled_from(["one", "two"])
JOBS = st.sampled_from(["a", "b", "c"])


class World(RuleBasedStateMachine):
    """Jobs that come, sleep, die and leave, fleets, and a janitor that may restart.

    A job that is awake renews its lease at least every 20 s; one that sleeps is silent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.leases = Leases(patience_seconds=PATIENCE)
        self.now = 0.0
        self.table_born = 0.0
        self.exists: set[str] = set()  # fleets that Serve runs
        self.removing: set[str] = set()
        self.held: dict[str, set[str]] = {"one": set(), "two": set()}
        self.heard: dict[str, float] = {}
        self.asleep: set[str] = set()
        self.last_needed: dict[str, float] = {}
        self.deployer: str | None = None

    @initialize()
    def begin(self) -> None:
        self.now = 1000.0

    def awake(self, fleet: str) -> set[str]:
        return self.held[fleet] - self.asleep

    @rule(job=JOBS, fleet=FLEETS)
    def come(self, job: str, fleet: str) -> None:
        """The job takes or renews a lease: awake, it has it unless the fleet is being removed."""
        self.asleep.discard(job)
        granted = self.leases.hold(fleet, job, self.now)
        assert granted == (fleet not in self.removing)
        if granted:
            self.held[fleet].add(job)
            self.last_needed[fleet] = self.now
        self.beat()

    @rule(job=JOBS, fleet=FLEETS)
    def leave(self, job: str, fleet: str) -> None:
        if job in self.asleep:
            return
        last = self.held[fleet] == {job}
        if self.deployer == job and job in self.held[fleet] and fleet not in self.removing:
            self.deployer = None
        gone = self.leases.release(fleet, job, self.now)
        self.held[fleet].discard(job)
        if gone:
            assert not self.awake(fleet)
            self.removing.add(fleet)
        elif last and fleet not in self.removing:
            # A table that restarted may not know the job: then the fleet becomes overdue.
            assert self.leases.holders(fleet) == []

    @rule(job=JOBS)
    def fall_asleep(self, job: str) -> None:
        """Killed, or paused: nobody can tell which."""
        self.asleep.add(job)

    @rule(seconds=st.sampled_from([1.0, 19.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.beat()

    @rule()
    def a_long_time_passes(self) -> None:
        for _ in range(4):
            self.time_passes(19.0)

    def beat(self) -> None:
        for fleet, jobs in self.held.items():
            for job in sorted(jobs - self.asleep):
                granted = self.leases.hold(fleet, job, self.now)
                assert granted == (fleet not in self.removing)
                if granted:
                    self.last_needed[fleet] = self.now

    @rule(job=JOBS)
    def deploy(self, job: str) -> None:
        if job in self.asleep or not any(job in jobs for jobs in self.held.values()):
            return
        if self.leases.claim_deployment(job, self.now):
            assert self.deployer in (None, job) or self.deployer in self.asleep
            self.deployer = job

    @precondition(lambda self: self.deployer is not None and self.deployer not in self.asleep)
    @rule(fleet=FLEETS)
    def finish_deploying(self, fleet: str) -> None:
        assert self.deployer is not None
        self.exists.add(fleet)
        self.last_needed.setdefault(fleet, self.now)
        self.leases.deployed(self.deployer)
        self.deployer = None

    @rule()
    def patrol(self) -> None:
        for fleet in self.leases.overdue(self.exists, self.now):
            assert fleet in self.exists
            assert not self.awake(fleet)
            self.removing.add(fleet)

    @rule(fleet=FLEETS, works=st.booleans())
    def finish_removing(self, fleet: str, works: bool) -> None:
        if fleet in self.removing:
            self.leases.removed(fleet)
            self.removing.discard(fleet)
            if works:
                self.exists.discard(fleet)

    @rule()
    def janitor_restarts(self) -> None:
        """Removals that were under way may or may not have been done."""
        self.leases = Leases(patience_seconds=PATIENCE)
        self.removing.clear()
        self.deployer = None
        self.beat()

    @rule()
    def everyone_dies_and_the_janitor_goes_round(self) -> None:
        """However it came to be, what nobody holds is removed after the patience."""
        self.asleep |= {"a", "b", "c"}
        self.patrol()
        self.now += PATIENCE
        self.patrol()
        assert self.exists <= self.removing
        for fleet in sorted(self.removing):
            self.finish_removing(fleet, works=True)
        assert not self.exists

    @invariant()
    def nobody_who_is_awake_has_lost_a_lease(self) -> None:
        for fleet in self.held:
            if fleet not in self.removing:
                assert self.awake(fleet) <= set(self.leases.holders(fleet))


World.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestWorld = World.TestCase


def test_a_fleet_goes_with_its_last_holder_and_nobody_gets_it_meanwhile() -> None:
    leases = Leases(patience_seconds=PATIENCE)
    assert leases.hold("fleet", "a", 0.0)
    assert leases.hold("fleet", "b", 1.0)
    assert not leases.release("fleet", "a", 2.0)
    assert leases.release("fleet", "b", 3.0)
    assert not leases.hold("fleet", "c", 4.0)
    leases.removed("fleet")
    assert leases.hold("fleet", "c", 5.0)


def test_a_job_that_slept_too_long_gets_its_lease_back_with_its_next_beat() -> None:
    leases = Leases(patience_seconds=PATIENCE)
    leases.hold("fleet", "a", 0.0)
    assert leases.overdue(["fleet"], 60.0) == ["fleet"]
    assert not leases.hold("fleet", "a", 61.0)
    leases.removed("fleet")
    assert leases.hold("fleet", "a", 62.0)
    assert leases.claim_deployment("a", 62.0)


def test_one_job_deploys_at_a_time_and_a_dead_one_does_not_stand_in_the_way() -> None:
    leases = Leases(patience_seconds=PATIENCE)
    leases.hold("one", "a", 0.0)
    leases.hold("two", "b", 50.0)
    assert not leases.claim_deployment("stranger", 50.0)
    assert leases.claim_deployment("a", 50.0)
    assert leases.claim_deployment("a", 50.0)
    assert not leases.claim_deployment("b", 59.0)
    assert leases.claim_deployment("b", 60.0)
    leases.deployed("a")
    assert not leases.claim_deployment("a", 61.0)
    leases.deployed("b")
    leases.hold("one", "a", 62.0)
    assert leases.claim_deployment("a", 62.0)


def test_a_janitor_that_restarted_waits_for_the_holders_of_fleets_it_does_not_know() -> None:
    leases = Leases(patience_seconds=PATIENCE)
    assert leases.overdue(["old"], 1000.0) == []
    assert leases.overdue(["old"], 1059.0) == []
    assert leases.overdue(["old"], 1060.0) == ["old"]
