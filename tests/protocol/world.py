"""A simulated deployment: prefill ranks and one decode rank, memory as stamped cells, a lossy network, one clock.

The world plays both shells. It owns what really happens (which write lands where, who reads what memory) and checks
every action of the machines against it, so a broken invariant fails at the action that breaks it.
"""

from __future__ import annotations

from lmkv.ids import Epoch, RequestId, TransferId
from lmkv.transfer import events as ev
from lmkv.transfer.prompt import Prompt
from lmkv.transfer.receiver import Receiver, ReceiverLimits
from lmkv.transfer.rects import cells_of
from lmkv.transfer.sender import SenderLimits

from .driving import P
from .endings import Endings
from .things import (
    CELL_BYTES,
    DECODE,
    JUNK,
    MAX_DELAY_S,
    PROMPT,
    RECEIVER,
    SENDER,
    Cell,
    Flight,
    Job,
    Message,
    PrefillRank,
    Region,
    cells,
    plan,
    prefill_peer,
)


class World(Endings):
    def __init__(
        self, ranks: int, limits: SenderLimits = SENDER, receiver: ReceiverLimits = RECEIVER, *, checked: bool = True
    ) -> None:
        self.checked = checked
        """Writes carry checksums. Without, decode believes whatever lands."""
        self.now = 100.0
        self.limits = limits
        self.prefill = [PrefillRank(rank, limits) for rank in range(ranks)]
        self.decode = Receiver(receiver)
        self.decode_alive = True
        self.decode_proven_dead = False
        self.regions: dict[tuple[TransferId, Epoch], Region] = {}
        self.flights: list[Flight] = []
        self.net: list[Message] = []
        self.deaf_to_decode: set[int] = set()
        """Ranks that do not get what decode sends on the control plane."""
        self.deaf_to_prefill: set[int] = set()
        """Ranks whose control messages do not get to decode."""
        self.prompts: dict[TransferId, Prompt] = {}
        """What prefill takes for the prompt, where that is not decode's."""
        self.log: list[tuple[float, str, object]] = []

    # --- feeding the machines -----------------------------------------------------------------------------------------

    def to_sender(self, rank: int, event: ev.SenderEvent) -> None:
        side = self.prefill[rank]
        if not side.alive:
            return
        if isinstance(event, ev.Heard | ev.Granted):
            side.heard_s = self.now
        if isinstance(event, ev.Granted):
            side.newest[event.transfer_id] = max(event.epoch, side.newest.get(event.transfer_id, event.epoch))
        self.log.append((self.now, side.into, event))
        for action in side.machine.handle(event, self.now):
            self.log.append((self.now, side.out, action))
            self._perform_sender(side, action)
        self._fence(side)

    def to_receiver(self, event: ev.ReceiverEvent) -> None:
        if not self.decode_alive:
            return
        self.log.append((self.now, "decode <-", event))
        for action in self.decode.handle(event, self.now):
            self.log.append((self.now, "decode ->", action))
            self._perform_receiver(action)

    # --- performing and checking actions ------------------------------------------------------------------------------

    def _perform_sender(self, side: PrefillRank, action: ev.SenderAction) -> None:
        match action:
            case ev.PostWrite():
                self._post(side, action)
            case ev.SendSeal(peer, tid, epoch, writes, size):
                self._seal(side, tid, epoch, writes, size)
                self._to_decode(side, ev.Sealed(side.peer, tid, epoch, writes, size), control=False)
            case ev.SendFailed(peer, tid, epoch, reason, _):
                self._promise(side, peer, tid, epoch)
                self._to_decode(side, ev.FailedCame(side.peer, tid, epoch, reason), control=True)
            case ev.SendCancelled(peer, tid, epoch):
                self._promise(side, peer, tid, epoch)
                self._to_decode(side, ev.CancelledCame(side.peer, tid, epoch), control=True)
            case ev.Finished():
                self._finished(side, action)

    def _post(self, side: PrefillRank, post: ev.PostWrite) -> None:
        tid, rect = post.transfer_id, post.rect
        job, region = side.jobs[tid], self.regions[tid, post.epoch]
        size = self.limits.rect_bytes(rect)
        assert post.peer == DECODE
        assert tid not in self.prompts, "posted KV of another prompt"
        assert self.now - side.heard_s < self.limits.lease_s, "posted when the lease was over"
        assert post.epoch == side.newest[tid], "posted for an old epoch"
        assert post.epoch > side.promised.get(tid, -1), "posted after promising that nothing would land"
        assert job.offered and job.finished is None and not job.withdrawn, "posted for an ended request"
        assert not job.revoked, "posted from blocks that are being overwritten"
        assert not job.fenced, "posted while the engine waits to overwrite the blocks"
        assert not side.proven_dead and not self.decode_proven_dead, "posted to a dead peer"
        assert size <= max(self.limits.max_post_bytes, CELL_BYTES[rect.group]), "too large a post"
        flying = sum(self.limits.rect_bytes(f.post.rect) for f in self.flights if f.rank == side.rank)
        assert flying == 0 or flying + size <= self.limits.max_inflight_bytes, "window exceeded"
        stamp = {}
        for cell in cells(rect):
            key = (tid, post.epoch, cell)
            side.posted[key] += 1
            assert side.posted[key] <= 1 + min(1, side.failed[key]), f"{cell} was posted too often"
            assert region.blocks[cell[0]][0] <= cell[2] < region.blocks[cell[0]][1], f"{cell} is outside the grant"
            assert job.memory.get(cell) == self.right(side.rank, tid, cell), f"{cell} is not computed: {job.memory}"
            stamp[cell] = job.memory[cell]
        flight = Flight(side.rank, post, stamp)
        self.flights.append(flight)
        if side.link_broken or not self.decode_alive or (tid, post.epoch) in side.void:
            flight.done = "connection lost"

    def _seal(self, side: PrefillRank, tid: TransferId, epoch: Epoch, writes: int, size: int) -> None:
        granted = {cell for rect in self.regions[tid, epoch].rects for cell in cells(rect)}
        posted = {cell for t, e, cell in side.posted if (t, e) == (tid, epoch)}
        assert posted == granted, "sealed before everything was posted"
        assert not side.jobs[tid].revoked, "sealed though its blocks are being overwritten"
        mine = [f for f in self.flights if f.rank == side.rank and f.post.transfer_id == tid]
        assert self.checked or not mine, "sealed while unchecked writes are in flight"
        assert size == sum(CELL_BYTES[group] for group, _, _ in granted) and (writes > 0) == (size > 0)

    def _promise(self, side: PrefillRank, peer: ev.Peer, tid: TransferId, epoch: Epoch) -> None:
        """Cancelled or Failed is being said: is it true?"""
        assert peer == DECODE
        for flight in self.flights:
            if flight.rank == side.rank and flight.post.transfer_id == tid and flight.post.epoch <= epoch:
                assert flight.landed or flight.done is not None, f"a promise while {flight.post} may land"
        side.promised[tid] = max(epoch, side.promised.get(tid, epoch))

    def _finished(self, side: PrefillRank, action: ev.Finished) -> None:
        tid = action.transfer_id
        if action.request_id is None:
            since = self.now - side.ended_early.get(tid, float("-inf"))
            assert since >= self.limits.tombstone_s, "a transfer that was not offered ended twice"
            side.ended_early[tid] = self.now
            return
        job = side.jobs[tid]
        assert job.offered and job.finished is None, "finished twice or never offered"
        flying = [f for f in self.flights if f.rank == side.rank and f.post.transfer_id == tid]
        assert not flying or action.outcome is ev.SendOutcome.PEER_LOST, "finished while its memory is being read"
        job.finished = action
        self._overwrite(job)

    def _overwrite(self, job: Job) -> None:
        for cell in job.memory:
            job.memory[cell] = JUNK

    def _fence(self, side: PrefillRank) -> None:
        for job in side.jobs.values():
            if job.fenced and side.machine.in_flight(job.tid) == 0:
                job.fenced = False
                self._overwrite(job)

    def _perform_receiver(self, action: ev.ReceiverAction) -> None:
        match action:
            case ev.SendCancel(peer, tid, epoch):
                if peer.rank not in self.deaf_to_decode:
                    self.net.append(Message(peer.rank, ev.CancelCame(DECODE, tid, epoch), self.now, True))
            case ev.Report():
                self._report(action)
            case ev.Drained(tid, _, epoch):
                region = self.regions[tid, epoch]
                assert region.report is not None and not region.report.drained and not region.closed
                region.closed = True

    def _report(self, report: ev.Report) -> None:
        region = self.regions[report.transfer_id, report.epoch]
        assert region.expected and region.report is None, "reported twice or never expected"
        region.report = report
        region.closed = report.drained
        if report.outcome is not ev.ReceiveOutcome.FAILED:
            assert report.drained, f"{report.outcome} while something may land"
        if report.outcome is ev.ReceiveOutcome.LOADED:
            for rank in range(len(self.prefill)):
                for cell in (cell for rect in region.rects for cell in cells(rect)):
                    have, right = region.memory.get((rank, cell)), f"kv/{rank}/{region.tid}/{cell}"
                    assert have == right, f"loaded, but {cell} of rank {rank} holds {have}"

    def right(self, rank: int, tid: TransferId, cell: Cell) -> str:
        """What prefill computes for a cell: another prompt gives other KV, which decode must never see."""
        return f"{'other prompt' if tid in self.prompts else 'kv'}/{rank}/{tid}/{cell}"

    # --- the data plane -----------------------------------------------------------------------------------------------

    def land(self, flight: Flight, *, part: bool = False) -> None:
        """The bytes arrive: what the source memory holds *now*. `part`: only some, and no note follows."""
        post, job = flight.post, self.prefill[flight.rank].jobs[flight.post.transfer_id]
        if not self.decode_alive:
            return
        region = self.regions[post.transfer_id, post.epoch]
        assert not region.closed, f"{post} lands in blocks that have been given away"
        fault = ""
        for i, cell in enumerate(cells(post.rect)):
            if part and i:
                return
            region.memory[flight.rank, cell] = "damaged" if flight.corrupt else job.memory[cell]
            if self.checked and region.memory[flight.rank, cell] != flight.stamp[cell]:
                fault = "is corrupt"
        if part:
            return
        flight.landed = True
        note = ev.Landed(
            prefill_peer(flight.rank), post.transfer_id, post.epoch, post.seq, post.rect,
            self.limits.rect_bytes(post.rect), fault,
        )  # fmt: skip
        self.net.append(Message(None, note, self.now, False))

    def deliver_done(self, flight: Flight) -> None:
        self.flights.remove(flight)
        post, side = flight.post, self.prefill[flight.rank]
        if flight.done:
            for cell in cells(post.rect):
                side.failed[post.transfer_id, post.epoch, cell] += 1
        self.to_sender(flight.rank, ev.WriteDone(post.transfer_id, post.seq, flight.done or ""))

    def break_link(self, rank: int) -> None:
        """The connection is lost: writes in flight end with errors, whether they have landed or not."""
        self.prefill[rank].link_broken = True
        for flight in self.flights:
            if flight.rank == rank:
                flight.done = "connection lost"

    # --- the network --------------------------------------------------------------------------------------------------

    def _to_decode(self, side: PrefillRank, event: ev.ReceiverEvent, *, control: bool) -> None:
        if not (control and side.rank in self.deaf_to_prefill):
            self.net.append(Message(None, event, self.now, control))

    def deliver(self, message: Message, *, keep: bool = False) -> None:
        if not keep:
            self.net.remove(message)
        if message.rank is None:
            self.to_receiver(message.event)  # type: ignore[arg-type]
        else:
            self.to_sender(message.rank, message.event)  # type: ignore[arg-type]

    # --- the engines --------------------------------------------------------------------------------------------------

    def offer(self, rank: int, tid: TransferId) -> None:
        job = self.prefill[rank].jobs.setdefault(tid, Job(tid))
        job.offered = True
        self.to_sender(rank, ev.Offer(tid, RequestId(f"p-{tid}"), self.prompts.get(tid, P)))

    def compute(self, rank: int, tid: TransferId) -> None:
        """The next rectangle, or PromptDone after the last."""
        job = self.prefill[rank].jobs[tid]
        steps = plan()
        if job.step == len(steps):
            self.end_prompt(rank, tid)
            return
        for cell in cells(steps[job.step]):
            job.memory[cell] = self.right(rank, tid, cell)
        job.step += 1
        self.to_sender(rank, ev.Computed(tid, steps[job.step - 1]))

    def end_prompt(self, rank: int, tid: TransferId) -> None:
        self.prefill[rank].jobs[tid].told_end = True
        self.to_sender(rank, ev.PromptDone(tid))

    def withdraw(self, rank: int, tid: TransferId) -> None:
        job = self.prefill[rank].jobs[tid]
        job.told_end = job.withdrawn = True
        self.to_sender(rank, ev.Withdraw(tid, "aborted"))

    def revoke(self, rank: int, tid: TransferId) -> None:
        """The engine has waited for long enough: it overwrites the blocks, whatever is in flight."""
        job = self.prefill[rank].jobs[tid]
        job.told_end = job.revoked = True
        job.fenced = False
        self._overwrite(job)
        self.to_sender(rank, ev.Revoke(tid, "preempted"))

    def preempt(self, rank: int, tid: TransferId) -> None:
        job = self.prefill[rank].jobs[tid]
        job.step, job.told_end, job.fenced = 0, False, True
        self.to_sender(rank, ev.Preempted(tid))

    def grant(self, tid: TransferId, epoch: int, blocks: tuple[tuple[int, int], ...] = PROMPT) -> Region:
        region = self.regions[tid, Epoch(epoch)] = Region(tid, Epoch(epoch), blocks)
        for side in self.prefill:
            side.jobs.setdefault(tid, Job(tid))
            if side.rank not in self.deaf_to_decode:
                self.net.append(
                    Message(
                        side.rank,
                        ev.Granted(DECODE, tid, Epoch(epoch), blocks, P, all_checked=self.checked),
                        self.now,
                        True,
                    )
                )
        return region

    def expect(self, region: Region) -> None:
        region.expected = True
        size = sum(cells_of(rect) * CELL_BYTES[rect.group] for rect in region.rects)
        writers = tuple(side.peer for side in self.prefill)
        request = RequestId(f"d-{region.tid}")
        self.to_receiver(ev.Expect(region.tid, request, region.epoch, writers, region.rects, size))

    # --- deaths -------------------------------------------------------------------------------------------------------

    def kill_prefill(self, rank: int) -> None:
        """Its posted writes may land until decode has proven the death and drained the connection."""
        self.prefill[rank].alive = False
        self.net = [m for m in self.net if m.rank != rank]

    def cut(self, rank: int) -> None:
        """The connection is reset under both, which live on and pair anew: what was granted before is void."""
        side = self.prefill[rank]
        side.void |= set(self.regions)
        for flight in self.flights:
            if flight.rank == rank and not flight.landed:
                flight.done = flight.done or "connection lost"
        self.to_receiver(ev.PeerGone(side.peer, False, True))
        self.to_sender(rank, ev.PeerGone(DECODE, False, True))

    def prove_prefill_dead(self, rank: int) -> None:
        self.flights = [f for f in self.flights if f.rank != rank]
        self.prefill[rank].proven_dead = True
        self.to_receiver(ev.PeerGone(prefill_peer(rank), True))

    def kill_decode(self) -> None:
        self.decode_alive = False
        self.net = [m for m in self.net if m.rank is not None]
        for flight in self.flights:
            flight.done = flight.done or "connection lost"

    def prove_decode_dead(self) -> None:
        self.decode_proven_dead = True
        for side in self.prefill:
            self.to_sender(side.rank, ev.PeerGone(DECODE, True))

    # --- time ---------------------------------------------------------------------------------------------------------

    def advance(self, seconds: float, step: float = 3.0) -> None:
        """In steps, with beats over every link that is up."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            self.net = [m for m in self.net if not m.control or self.now - m.born_s <= MAX_DELAY_S]
            for side in self.prefill:
                if self.decode_alive and side.alive and side.rank not in self.deaf_to_decode:
                    self.to_sender(side.rank, ev.Heard(DECODE))
                if side.alive and side.rank not in self.deaf_to_prefill:
                    self.to_receiver(ev.Heard(side.peer))
            self.tick()

    def tick(self) -> None:
        """Tick all; a machine that had not asked for this time must have nothing to do."""
        for side in self.prefill:
            due = side.machine.next_deadline_s()
            before = len(self.log)
            self.to_sender(side.rank, ev.Tick())
            assert (due is not None and due <= self.now) or len(self.log) <= before + 1, f"late: {self.log[before:]}"
        due, before = self.decode.next_deadline_s(), len(self.log)
        self.to_receiver(ev.Tick())
        assert (due is not None and due <= self.now) or len(self.log) <= before + 1, f"late: {self.log[before:]}"
