"""The worker loop: one thread a rank that owns the data plane, the mailbox and both machines.

It turns commands of the engine thread, letters of peers and events of the transport into events of the machines, and
performs the actions they return. Nobody else touches what it owns.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Sequence

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.guard import Guard
from lmkv.control.mailbox import Inbox, Outbox
from lmkv.control.replacing import Replacing
from lmkv.control.runtime import THREADS, Runtime
from lmkv.control.wake import has_mail
from lmkv.errors import TransportError, WireError
from lmkv.ids import Rank, TransferId
from lmkv.transfer import events as ev
from lmkv.transport import Completion, Event, Notification, OpId, PeerId, PeerLost, Transport

from .commands import (
    Abandoned,
    Command,
    Ended,
    Expected,
    Fenced,
    LayersDone,
    Loading,
    Offered,
    Overwritten,
    Preempted,
    Ready,
    Results,
    StepDone,
    Stored,
    Withdrawn,
    Yielded,
    split,
)
from .failures import Failures
from .letters import Letters
from .memory import KvMemory
from .pace import BUSY_S, pause_s
from .pal import Loss
from .peers import Peers
from .pooled.rank import PoolRank
from .receiving import Receiving
from .results_box import ResultsBox
from .sending import Sending

logger = logging.getLogger(__name__)


class WorkerLoop:
    """`start` returns once memory is registered; `export` and `address` are valid from then on.

    The engine thread uses what stands first. The rest, a `Part`, is the loop thread's.
    """

    def __init__(
        self,
        settings: ConnectorSettings,
        rank: Rank,
        transport: Transport,
        memory: KvMemory,
        listen: str,
        pool: PoolRank | None = None,
        runtime: Runtime = THREADS,
    ) -> None:
        self._runtime = runtime
        self._rank = rank
        self._transport = transport
        self._memory = memory
        self._context = runtime.context()
        self._inbox = Inbox(self._context, listen, settings.advertise)
        self._outbox = Outbox(self._context, watch=True, clock=runtime.clock)
        self._commands: deque[Command] = deque()
        self._results = ResultsBox(runtime.wait)
        self._guard = Guard(f"worker loop {rank}", runtime.caught)
        self._is_over = False
        self._is_stopping = False
        self._fences: list[Preempted] = []
        self._pool = pool
        self._is_watched = False
        """The runner knows our descriptors."""
        self._stored = threading.Event()
        """Nothing is on its way to the pool."""
        self._ended_s = 0.0
        self._peers = Peers(transport, self._outbox, rank, memory.warm_extents, settings, self._peer_gone, self._holds)
        self._sending = Sending(settings, rank, transport, memory, self._peers, runtime.clock)
        self._receiving = Receiving(settings, rank, memory, self._peers, runtime.clock)
        self._letters = Letters(rank, self._peers, self._sending, self._receiving, pool, self._outbox)
        self._failures = Failures(self._peers, self._sending, self._receiving, pool)
        replacing = Replacing(
            transport,
            [self._peers, *([pool] if pool is not None else [])],
            lambda: f"lmkv-{rank}-{runtime.entropy(8).hex()}",
            pool.peer_lost if pool is not None else lambda peer, reason: None,
            self._completed,
        )
        self._ticks = [
            ("peers", self._peers.tick),
            ("data plane", replacing.tick),
            ("sending", self._sending.tick),
            ("receiving", self._receiving.tick),
            *([("pool", pool.tick)] if pool is not None else []),
        ]
        self._export: bytes | None = None
        self._runner = runtime.runner(f"lmkv-writer-{rank}", self)

    # --- engine thread ---

    @property
    def address(self) -> str:
        return self._inbox.address

    @property
    def export(self) -> bytes:
        assert self._export is not None, "`start` has returned"
        return self._export

    @property
    def alive(self) -> bool:
        return self._runner.alive and not self._is_over

    def start(self) -> None:
        """Raises what went wrong in registering (TransportError)."""
        self._runner.start()

    def submit(self, command: Command) -> None:
        """After the loop's death nothing is kept, and nobody waits: see `alive`."""
        self._commands.append(command)
        self._runner.wake()
        if self._is_over:
            self._let_go()

    def revoke(self, transfer_ids: tuple[TransferId, ...]) -> None:
        """Their blocks are overwritten from now on, although writes may still read them: the transfers fail for good,
        and nothing that was in flight counts (see `Sending.revoke`)."""
        self._sending.revoke(transfer_ids)
        self.submit(Preempted(transfer_ids, gave_up=True))

    def take(self, wait_s: float = 0.0) -> Results:
        """What has ended since the last call; waits so long for something to end."""
        return self._results.take(wait_s if self.alive else 0.0)

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything that was to be stored in the pool is there; False if it took too long."""
        self._stored.clear()  # what was submitted just now is not idle yet
        self._runner.wake()
        return self._pool is None or not self.alive or self._runtime.wait(self._stored, timeout_s)

    def close(self) -> None:
        """Stop, whatever is in flight; the process is about to end."""
        self._is_stopping = True
        self._runner.stop(timeout_s=10)

    # --- loop thread ---

    def open(self) -> None:
        """Raises what goes wrong in registering (TransportError)."""
        self._memory.device.enter_thread()
        for region in self._memory.regions:
            self._transport.register(region)
        if self._pool is not None:
            self._pool.open(self._context, self._transport, self._memory.scratch_extents, self._outbox)
        self._export = self._transport.export()

    def end(self) -> None:
        self._is_over = True
        with contextlib.ExitStack() as closing:  # whatever fails, the rest is closed
            closing.callback(self._context.term)
            closing.callback(self._inbox.close)
            closing.callback(self._outbox.close)
            if not self._is_stopping:
                closing.callback(self._letters.say_broken)
            closing.callback(self._let_go)
            closing.callback(self._transport.abort)
            if self._pool is not None:
                closing.callback(self._pool.close)

    def _let_go(self) -> None:
        """Nobody of the engine waits for what will not be done. Nothing is read from its blocks any more."""
        self._stored.set()
        self._results.release()
        fences, self._fences = self._fences, []
        for fence in fences:
            fence.drained.set()
        while True:
            try:
                command = self._commands.popleft()
            except IndexError:
                return
            if isinstance(command, Preempted | Overwritten):
                command.drained.set()

    def turn(self, now_s: float) -> None:
        if self._transport.in_flight == 0:
            self._ended_s = now_s
        self._take_letters(now_s)
        self._take_commands(now_s)
        self._take_events(now_s)
        for name, tick in self._ticks:
            self._guard.work(name, lambda tick=tick: tick(now_s))  # type: ignore[misc]
        self._publish(now_s)

    def descriptors(self) -> Sequence[int] | None:
        """Nodes come and go, and their sockets with them."""
        has_changed = self._pool is not None and self._pool.fds_changed()
        if self._is_watched and not has_changed:
            return None
        self._is_watched = True
        pool_fds = self._pool.fds if self._pool is not None else []
        return [self._inbox.socket.fileno(), *self._transport.fds(), *pool_fds]

    def next_s(self, now_s: float) -> float:
        if has_mail(self._inbox.socket) or (self._commands and not self._blocked()):
            return 0.0
        most = 1.0 if self._transport.fds() else self._pause_s(now_s)
        if self._commands:
            most = min(most, BUSY_S)
        deadlines = [d - now_s for d in (self._sending.deadline_s(), self._receiving.deadline_s()) if d is not None]
        pool_s = self._pool.next_s(now_s) if self._pool is not None else 3600.0
        return max(0.0, min([most, pool_s, self._peers.next_s(now_s), *deadlines]))

    def _pause_s(self, now_s: float) -> float:
        """Between two polls of a data plane without descriptors."""
        pool = self._pool
        return pause_s(
            hurries=pool is not None and pool.hurries(now_s),
            awaits=self._receiving.active or self._peers.warming or (pool is not None and pool.waiting),
            in_flight=self._transport.in_flight,
            since_s=now_s - self._ended_s,
        )

    def _blocked(self) -> bool:
        """The next command waits for the device."""
        head = self._commands[0]
        return isinstance(head, Fenced) and head.fence is not None and not head.fence.query()

    def _take_commands(self, now_s: float) -> None:
        while self._commands and not self._blocked():
            for command in split(self._commands.popleft()):
                self._guard.attempt(
                    type(command).__name__,
                    lambda command=command: self._take_command(command, now_s),  # type: ignore[misc]
                    lambda command=command: self._failures.command(command, now_s),  # type: ignore[misc]
                )

    def _take_command(self, command: Command, now_s: float) -> None:
        match command:
            case LayersDone():
                self._sending.layers_done(command, now_s)
            case Ready():
                self._sending.ready(command, now_s)
            case StepDone():
                self._sending.step_done(command, now_s)
            case Offered():
                self._sending.offered(command.offers, now_s)
            case Withdrawn():
                self._sending.withdrawn(command.withdrawals, now_s)
            case Yielded():
                self._sending.yielded(command.transfer_id, now_s)
            case Expected():
                self._receiving.expected(command.expects, now_s)
            case Abandoned():
                self._receiving.abandoned(command.transfer_ids, now_s)
            case Preempted():
                self._fences.append(command)
                self._sending.preempted(command.transfer_ids, now_s, command.gave_up)
            case _:
                self._take_pool_command(command, now_s)

    def _take_pool_command(self, command: Command, now_s: float) -> None:
        assert self._pool is not None, "the engine side sends these only where there is a pool"
        match command:
            case Stored():
                self._pool.store(command.specs, command.holds, now_s)
            case Loading():
                self._pool.load(command.specs, now_s)
            case Ended():
                for request_id in command.request_ids:
                    self._pool.cancel(request_id)
            case Overwritten():
                self._pool.drop(command.request_ids, now_s)
                command.drained.set()

    def _take_letters(self, now_s: float) -> None:
        for letter in self._inbox.receive():
            message = letter.message
            self._guard.attempt(
                type(message).__name__,
                lambda message=message: self._letters.take(message, now_s),  # type: ignore[misc]
                lambda message=message: self._failures.letter(message),  # type: ignore[misc]
                str(getattr(message, "incarnation", "")),
            )

    def _take_events(self, now_s: float) -> None:
        events: list[Event] = []
        self._guard.work("poll", lambda: events.extend(self._transport.poll()))
        for event in events:
            tid = self._sending.transfer_of_op(event.op) if isinstance(event, Completion) else None
            self._guard.attempt(
                type(event).__name__,
                lambda event=event: self._take_event(event, now_s),  # type: ignore[misc]
                lambda event=event, tid=tid: self._failures.event(event, tid, now_s),  # type: ignore[misc]
                "" if isinstance(event, Completion) else event.peer,
            )

    def _take_event(self, event: Event, now_s: float) -> None:
        match event:
            case Completion(op, error):
                self._ended_s = now_s
                self._transport.release(op)
                if not self._peers.completed(op, error, now_s):
                    self._completed(op, error, now_s)
            case Notification(transport_id, payload):
                self._take_note(transport_id, payload, now_s)
            case PeerLost(transport_id, reason):
                if self._pool is not None and self._pool.peer_lost(transport_id, reason):
                    return
                self._peers.transport_lost(transport_id, reason)

    def _completed(self, op: OpId, error: TransportError | None, now_s: float) -> None:
        if self._pool is None or not self._pool.completed(op, error, now_s):
            self._sending.completed(op, error, now_s)

    def _take_note(self, transport_id: PeerId, payload: bytes, now_s: float) -> None:
        peer = self._peers.peer_of(transport_id)
        try:
            note = wire.decode_note(payload)
        except WireError as error:
            logger.warning("note of %s dropped: %s", transport_id, error)
            return
        if isinstance(note, wire.WarmNote):
            self._peers.warm_note_came(transport_id, note)
            return
        if peer is None:
            logger.warning("note of unknown peer %s dropped", transport_id)
            return
        self._receiving.note_came(peer, note, now_s)

    def _peer_gone(self, peer: ev.Peer, loss: Loss) -> None:
        now_s = self._runtime.clock()
        gone = ev.PeerGone(peer, dead=loss is Loss.DEAD, fenced=loss is Loss.FENCED)
        self._sending.handle(gone, now_s)
        self._receiving.handle(gone, now_s)

    def _holds(self, peer: ev.Peer) -> bool:
        return self._receiving.holds(peer)

    def _publish(self, now_s: float) -> None:
        for fence in self._fences:
            if all(self._sending.in_flight(tid) == 0 for tid in fence.transfer_ids):
                fence.drained.set()
        self._fences = [fence for fence in self._fences if not fence.drained.is_set()]
        sent, sent_ledgers = self._sending.take()
        reports, received_ledgers = self._receiving.take()
        fresh = Results(sent, reports, sent_ledgers + received_ledgers, failures=self._guard.take_counts())
        if self._pool is not None:
            fresh.failures += self._pool.guard.take_counts()
            fresh.loads = self._pool.take_reports()
            fresh.packed = self._pool.take_packed()
            fresh.counted = self._pool.take_counters(now_s) or Counter()
        fresh.add(self._failures.take())
        if self._pool is not None and self._pool.idle and not self._commands:
            self._stored.set()
        else:
            self._stored.clear()
        if fresh:
            self._results.add(fresh)
