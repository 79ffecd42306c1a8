"""Senders and a receiver in a hostile world: whatever happens in whatever order, the invariants hold."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from lmkv.ids import TransferId
from lmkv.transfer import events as ev

from .things import DECODE, PROMPT, prefill_peer
from .world import World

TIDS = tuple(TransferId(name) for name in ("a", "b"))
INDEX = st.integers(0, 1 << 16)
TID = st.sampled_from(TIDS)
GRANTS = st.sampled_from(
    [PROMPT, PROMPT, PROMPT, ((1, 4), (0, 3)), ((4, 4), (2, 3)), ((0, 0), (0, 0)), ((0, 5), (0, 3))]
)
WAITS = st.sampled_from([0.5, 0.5, 0.5, 1.0, 1.0, 3.0, 3.0, 11.0, 35.0, 61.0, 125.0])


class Hostile(RuleBasedStateMachine):
    """Rules pick from what is possible by an index, so that every draw means something."""

    ranks: ClassVar[int] = 1
    faults: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.ranks)
        self.epochs = dict.fromkeys(TIDS, 0)

    def _jobs(self) -> list[tuple[int, TransferId]]:
        return [
            (side.rank, job.tid)
            for side in self.world.prefill
            for job in side.jobs.values()
            if side.alive and job.offered and not job.told_end and not job.fenced
        ]

    # --- engines ---

    @rule(tid=TID, rank=INDEX)
    def offer(self, tid: TransferId, rank: int) -> None:
        side = self.world.prefill[rank % self.ranks]
        if side.alive and not (tid in side.jobs and side.jobs[tid].offered):
            self.world.offer(side.rank, tid)

    @precondition(_jobs)
    @rule(pick=INDEX, steps=st.integers(1, 7))
    def compute(self, pick: int, steps: int) -> None:
        rank, tid = self._jobs()[pick % len(self._jobs())]
        for _ in range(steps):
            if (rank, tid) in self._jobs():
                self.world.compute(rank, tid)

    @precondition(lambda self: self.faults and self._jobs())
    @rule(pick=INDEX, how=st.sampled_from(["withdraw", "preempt", "preempt", "end_prompt"]))
    def disturb(self, pick: int, how: str) -> None:
        rank, tid = self._jobs()[pick % len(self._jobs())]
        getattr(self.world, how)(rank, tid)

    @precondition(lambda self: self.faults)
    @rule(pick=INDEX, tid=TID)
    def stop_a_finished_prompt(self, pick: int, tid: TransferId) -> None:
        side = self.world.prefill[pick % self.ranks]
        job = side.jobs.get(tid)
        if side.alive and job and job.offered and job.told_end and not job.withdrawn:
            self.world.withdraw(side.rank, tid)

    @precondition(lambda self: self.world.decode_alive)
    @rule(tid=TID, blocks=GRANTS, expect_now=st.booleans(), again=st.booleans())
    def grant(self, tid: TransferId, blocks: tuple[tuple[int, int], ...], expect_now: bool, again: bool) -> None:
        if self.epochs[tid] and not (again and self.faults):
            return
        if not self.faults:
            blocks = tuple((lo, min(hi, end)) for (lo, hi), (_, end) in zip(blocks, PROMPT, strict=True))
        self.epochs[tid] += 1
        region = self.world.grant(tid, self.epochs[tid], blocks)
        if expect_now:
            self.world.expect(region)

    @precondition(lambda self: any(not r.expected for r in self.world.regions.values()))
    @rule()
    def expect(self) -> None:
        self.world.expect(next(r for r in self.world.regions.values() if not r.expected))

    @precondition(lambda self: self.faults)
    @rule(tid=TID, what=st.sampled_from(["abandon", "not needed"]))
    def decide_otherwise(self, tid: TransferId, what: str) -> None:
        if what == "abandon":
            self.world.to_receiver(ev.Abandon(tid))
        else:
            for side in self.world.prefill:
                self.world.to_sender(side.rank, ev.NotNeededCame(tid, "hit"))

    # --- the data plane ---

    @precondition(lambda self: self.world.flights)
    @rule(pick=INDEX, how=st.sampled_from(["land", "land", "land", "fail", "fail in part", "done"]))
    def write(self, pick: int, how: str) -> None:
        flight = self.world.flights[pick % len(self.world.flights)]
        if flight.done is not None:
            if self.world.prefill[flight.rank].alive:
                self.world.deliver_done(flight)
        elif how == "land" and not flight.landed:
            self.world.land(flight)
        elif flight.landed:
            flight.done = ""
        elif how.startswith("fail") and self.faults:
            if "part" in how:
                self.world.land(flight, part=True)
            flight.done = "error"

    @precondition(lambda self: self.world.flights)
    @rule()
    def all_writes_land(self) -> None:
        for flight in list(self.world.flights):
            if flight.done is None and not flight.landed:
                self.world.land(flight)
            flight.done = flight.done or ""
            if self.world.prefill[flight.rank].alive:
                self.world.deliver_done(flight)

    @precondition(lambda self: self.faults)
    @rule(rank=INDEX)
    def break_link(self, rank: int) -> None:
        self.world.break_link(rank % self.ranks)

    # --- the network ---

    @precondition(lambda self: self.world.net)
    @rule(pick=INDEX, how=st.sampled_from(["deliver", "deliver", "duplicate", "drop"]))
    def message(self, pick: int, how: str) -> None:
        message = self.world.net[pick % len(self.world.net)]
        if how == "drop" and message.control and self.faults:
            self.world.net.remove(message)
        else:
            self.world.deliver(message, keep=how == "duplicate")

    @precondition(lambda self: self.world.net)
    @rule()
    def deliver_in_order(self) -> None:
        for message in list(self.world.net):
            if message in self.world.net:
                self.world.deliver(message)

    @precondition(lambda self: self.faults)
    @rule(rank=INDEX, to_decode=st.booleans(), to_prefill=st.booleans())
    def partition(self, rank: int, to_decode: bool, to_prefill: bool) -> None:
        for side, cut in ((self.world.deaf_to_prefill, to_decode), (self.world.deaf_to_decode, to_prefill)):
            (side.add if cut else side.discard)(rank % self.ranks)

    # --- time and death ---

    @rule(seconds=WAITS)
    def advance(self, seconds: float) -> None:
        self.world.advance(seconds if self.faults else 0.5)

    @precondition(lambda self: self.faults)
    @rule(rank=INDEX, at=st.sampled_from(["sender", "receiver"]))
    def suspect(self, rank: int, at: str) -> None:
        if at == "sender":
            self.world.to_sender(rank % self.ranks, ev.PeerGone(DECODE, False))
        else:
            self.world.to_receiver(ev.PeerGone(prefill_peer(rank % self.ranks), False))

    @precondition(lambda self: self.faults)
    @rule(rank=INDEX, prove=st.booleans(), luck=st.integers(0, 2))
    def kill_prefill(self, rank: int, prove: bool, luck: int) -> None:
        side = self.world.prefill[rank % self.ranks]
        if side.alive and luck == 0:
            self.world.kill_prefill(side.rank)
        if not side.alive and prove and not side.proven_dead:
            self.world.prove_prefill_dead(side.rank)

    @precondition(lambda self: self.faults)
    @rule(prove=st.booleans(), luck=st.integers(0, 2))
    def kill_decode(self, prove: bool, luck: int) -> None:
        if self.world.decode_alive and luck == 0:
            self.world.kill_decode()
        if not self.world.decode_alive and prove and not self.world.decode_proven_dead:
            self.world.prove_decode_dead()

    def teardown(self) -> None:
        self.world.heal()
        self.world.check_end()


class HostileTwoRanks(Hostile):
    ranks = 2


class Friendly(Hostile):
    """No faults, only reordering, duplicates, slow writes and late grants: then everything must be loaded."""

    ranks = 2
    faults = False

    def teardown(self) -> None:
        world = self.world
        for tid in TIDS:
            for side in world.prefill:
                if not (tid in side.jobs and side.jobs[tid].offered):
                    world.offer(side.rank, tid)
            if not self.epochs[tid]:
                world.grant(tid, 1)
        super().teardown()
        assert {region.report.outcome for region in world.regions.values() if region.report} == {"loaded"}
        assert {job.finished.outcome for s in world.prefill for job in s.jobs.values() if job.finished} == {"sent"}


@pytest.mark.parametrize(
    ("machine", "examples"),
    [(Hostile, 250), (HostileTwoRanks, 250), (Friendly, 60)],
    ids=["one rank", "two ranks", "no faults"],
)
def test_whatever_happens(machine: type[Hostile], examples: int) -> None:
    profile = settings.get_profile(settings.get_current_profile_name())
    if settings.get_current_profile_name() == "ci":
        profile = settings(profile, max_examples=examples)
    run_state_machine_as_test(machine, settings=settings(profile, stateful_step_count=40))
