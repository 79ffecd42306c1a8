"""Senders and a receiver in a hostile world: whatever happens in whatever order, the invariants hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from lmkv.ids import TransferId
from lmkv.transfer import events as ev
from lmkv.transfer.prompt import Prompt

from .driving import P
from .things import DECODE, PROMPT, Flight, prefill_peer
from .world import World

TIDS = tuple(TransferId(name) for name in ("a", "b"))
INDEX = st.integers(0, 1 << 16)
TID = st.sampled_from(TIDS)
GRANTS = st.sampled_from(
    [PROMPT, PROMPT, PROMPT, ((1, 4), (0, 3)), ((4, 4), (2, 3)), ((0, 0), (0, 0)), ((0, 5), (0, 3))]
)
WAITS = st.sampled_from([0.5] * 8 + [1.0] * 6 + [3.0] * 4 + [11.0] * 3 + [35.0, 61.0, 125.0])
FAULTS = st.sampled_from(
    ["fail", "fail in part", "preempt", "revoke", "withdraw", "abandon", "drop", "partition", "suspect"] * 2
    + [
        "end_prompt",
        "not needed",
        "break link",
        "cut",
        "cut",
        "kill prefill",
        "kill decode",
        "prove",
        "prove",
        "heal",
        "heal",
        "heal",
    ]
)
PROMPTS = st.sampled_from(
    [P] * 6 + [Prompt(b"q" * 16, P.tokens), Prompt(P.digest, P.tokens + 1), Prompt(b"", P.tokens)]
)
Blocks = tuple[tuple[int, int], ...]


class Hostile(RuleBasedStateMachine):
    """Rules pick from what is possible by an index, so that every draw means something."""

    ranks: ClassVar[int] = 1
    checked: ClassVar[bool] = True
    faults: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.ranks, checked=self.checked)
        self.epochs = dict.fromkeys(TIDS, 0)

    @initialize(
        offers=st.lists(st.booleans(), min_size=4, max_size=4),
        granted=st.booleans(),
        blocks=GRANTS,
        prompts=st.tuples(PROMPTS, PROMPTS),
    )
    def begin(self, offers: list[bool], granted: bool, blocks: Blocks, prompts: tuple[Prompt, Prompt]) -> None:
        if self.faults:
            self.world.prompts = {tid: prompt for tid, prompt in zip(TIDS, prompts, strict=True) if prompt != P}
        for tid, offered in zip(TIDS * 2, offers, strict=True):
            if offered:
                self.offer(tid, offers.index(offered))
        if granted:
            self.grant(TIDS[0], blocks, True, True)

    # --- what moves on by itself ---

    def _running(self) -> list[tuple[int, TransferId]]:
        return [
            (side.rank, job.tid)
            for side in self.world.prefill
            for job in side.jobs.values()
            if side.alive and job.offered and not job.told_end and not job.fenced
        ]

    def _step_of(self, flight: Flight) -> None:
        if flight.done is not None:
            self.world.deliver_done(flight)
        elif flight.landed:
            flight.done = ""
        else:
            self.world.land(flight)

    def _moves(self) -> list[Callable[[], object]]:
        """Everything that can happen next without a fault: an engine computes, a write moves, a message arrives."""
        world = self.world
        moves: list[Callable[[], object]] = []
        for rank, tid in self._running():
            moves += [lambda rank=rank, tid=tid: world.compute(rank, tid)] * 2
        for flight in world.flights:
            if flight.done is None or world.prefill[flight.rank].alive:
                moves.append(lambda flight=flight: self._step_of(flight))
        moves += [lambda message=message: world.deliver(message) for message in world.net]
        return moves

    @rule(picks=st.lists(INDEX, min_size=1, max_size=12))
    def go_on(self, picks: list[int]) -> None:
        for pick in picks:
            moves = self._moves()
            if moves:
                moves[pick % len(moves)]()

    @rule(count=st.integers(1, 8))
    def compute(self, count: int) -> None:
        for _ in range(count):
            for rank, tid in self._running():
                self.world.compute(rank, tid)

    @precondition(lambda self: self.world.net)
    @rule(pick=INDEX, twice=st.booleans())
    def one_message(self, pick: int, twice: bool) -> None:
        self.world.deliver(self.world.net[pick % len(self.world.net)], keep=twice)

    @precondition(lambda self: self.world.net)
    @rule()
    def all_messages(self) -> None:
        for message in list(self.world.net):
            if message in self.world.net:
                self.world.deliver(message)

    @rule(seconds=WAITS)
    def wait(self, seconds: float) -> None:
        self.world.advance(seconds if self.faults else 0.5)

    # --- engines ---

    @rule(tid=TID, rank=INDEX)
    def offer(self, tid: TransferId, rank: int) -> None:
        side = self.world.prefill[rank % self.ranks]
        if side.alive and not (tid in side.jobs and side.jobs[tid].offered):
            self.world.offer(side.rank, tid)

    @precondition(lambda self: self.world.decode_alive)
    @rule(tid=TID, blocks=GRANTS, expect_now=st.booleans(), again=st.booleans())
    def grant(self, tid: TransferId, blocks: Blocks, expect_now: bool, again: bool) -> None:
        if self.epochs[tid] and not (again and self.faults):
            return
        if not self.faults:
            blocks = tuple((lo, min(hi, end)) for (lo, hi), (_, end) in zip(blocks, PROMPT, strict=True))
        self.epochs[tid] += 1
        region = self.world.grant(tid, self.epochs[tid], blocks)
        if expect_now:
            self.world.expect(region)

    @precondition(lambda self: any(not region.expected for region in self.world.regions.values()))
    @rule()
    def expect(self) -> None:
        self.world.expect(next(region for region in self.world.regions.values() if not region.expected))

    # --- faults ---

    @precondition(lambda self: self.faults)
    @rule(what=FAULTS, pick=INDEX, tid=TID, ways=st.tuples(st.booleans(), st.booleans()))
    def fault(self, what: str, pick: int, tid: TransferId, ways: tuple[bool, bool]) -> None:
        rank = pick % self.ranks
        match what:
            case "fail" | "fail in part" | "corrupt":
                self._spoil(pick, what)
            case "preempt" | "end_prompt" | "withdraw" | "revoke":
                self._disturb(what, rank, tid)
            case "abandon":
                self.world.to_receiver(ev.Abandon(tid))
            case "not needed":
                self.world.to_sender(rank, ev.NotNeededCame(tid, "hit"))
            case "drop":
                control = [message for message in self.world.net if message.control]
                if control:
                    self.world.net.remove(control[pick % len(control)])
            case "partition" | "heal":
                for deaf, cut in zip((self.world.deaf_to_prefill, self.world.deaf_to_decode), ways, strict=True):
                    (deaf.add if cut and what == "partition" else deaf.discard)(rank)
            case "suspect" if ways[0]:
                self.world.to_sender(rank, ev.PeerGone(DECODE, False))
            case "suspect":
                self.world.to_receiver(ev.PeerGone(prefill_peer(rank), False))
            case _:
                self._lose(what, rank)

    def _spoil(self, pick: int, what: str) -> None:
        open_ = [flight for flight in self.world.flights if flight.done is None and not flight.landed]
        if open_:
            flight = open_[pick % len(open_)]
            if what == "fail in part":
                self.world.land(flight, part=True)
            flight.corrupt = what == "corrupt"
            flight.done = None if flight.corrupt else "error"

    def _disturb(self, what: str, rank: int, tid: TransferId) -> None:
        side = self.world.prefill[rank]
        job = side.jobs.get(tid)
        may = what in ("withdraw", "revoke") or (job and not job.told_end)
        if job and may and job.offered and side.alive and not job.withdrawn and not job.revoked:
            getattr(self.world, what)(rank, tid)

    def _lose(self, what: str, rank: int) -> None:
        world, side = self.world, self.world.prefill[rank]
        match what:
            case "break link":
                world.break_link(rank)
            case "cut" if side.alive and world.decode_alive:
                world.cut(rank)
            case "kill prefill" if side.alive:
                world.kill_prefill(rank)
            case "kill decode" if world.decode_alive:
                world.kill_decode()
            case "prove":
                if not side.alive and not side.proven_dead:
                    world.prove_prefill_dead(rank)
                if not world.decode_alive and not world.decode_proven_dead:
                    world.prove_decode_dead()

    def teardown(self) -> None:
        self.world.heal()
        self.world.check_end()


class HostileTwoRanks(Hostile):
    ranks = 2


class HostileUnchecked(HostileTwoRanks):
    """Writes carry no checksums: what was in flight when its source was overwritten must not count all the same."""

    checked = False


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


class FriendlyUnchecked(Friendly):
    """Everything is loaded though seals wait for the writes."""

    checked = False


@pytest.mark.parametrize(
    ("machine", "examples"),
    [(Hostile, 100), (HostileTwoRanks, 100), (HostileUnchecked, 100), (Friendly, 30), (FriendlyUnchecked, 30)],
    ids=["one rank", "two ranks", "no checksums", "no faults", "no faults, no checksums"],
)
def test_whatever_happens(machine: type[Hostile], examples: int) -> None:
    profile = settings.get_profile(settings.get_current_profile_name())
    if settings.get_current_profile_name() == "ci":
        profile = settings(profile, max_examples=examples)
    run_state_machine_as_test(machine, settings=settings(profile, stateful_step_count=30))
