"""The worker loop: one thread a rank that owns the data plane, the mailbox and both machines.

It turns commands of the engine thread, letters of peers and events of the transport into events of the machines, and
performs the actions they return. Nobody else touches what it owns.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Inbox, Outbox, make_context
from lmkv.control.wake import Wake, wait
from lmkv.errors import LmkvError, WireError
from lmkv.ids import Rank
from lmkv.transfer import events as ev
from lmkv.transport import Completion, Notification, PeerId, PeerLost, Transport

from .commands import (
    Abandoned,
    Command,
    Ended,
    Expected,
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
)
from .memory import KvMemory
from .peers import Peers
from .pooled.rank import PoolRank
from .receiving import Receiving
from .sending import Sending

logger = logging.getLogger(__name__)

PACE_S = 0.00005
BUSY_S = 0.001
SLOW_S = 0.008
IDLE_S = 0.05
"""A data plane without descriptors is polled this often: while pages are loaded, while something is expected, while
writes take long, and otherwise."""
LONG_S = 0.005
"""A rank that only sends and has seen no write end for so long has a slow link. To look every millisecond would then
push a few packets at a time, and cost the engine on the same core a tenth of its speed."""


class WorkerLoop:
    """`start` returns once memory is registered; `export` and `address` are valid from then on."""

    def __init__(
        self,
        settings: ConnectorSettings,
        rank: Rank,
        transport: Transport,
        memory: KvMemory,
        listen: str,
        pool: PoolRank | None = None,
    ) -> None:
        self._transport = transport
        self._memory = memory
        self._context = make_context()
        self._inbox = Inbox(self._context, listen, settings.advertise)
        self._outbox = Outbox(self._context, watch=True)
        self._wake = Wake()
        self._commands: deque[Command] = deque()
        self._results = Results()
        self._told = threading.Condition()
        """Holds the results' lock; notified when there are some."""
        self._stopping = threading.Event()
        self._fences: list[Preempted] = []
        self._pool = pool
        self._pool_fds: list[int] = []
        self._stored = threading.Event()
        """Nothing is on its way to the pool."""
        self._ended_s = 0.0
        self._peers = Peers(transport, self._outbox, rank, memory.scratch_extents, settings, self._peer_gone)
        self._sending = Sending(settings, rank, transport, memory, self._peers, self._outbox)
        self._receiving = Receiving(settings, rank, memory, self._peers, self._outbox)
        self._thread = threading.Thread(target=self._run, name=f"lmkv-writer-{rank}", daemon=True)
        self._started: Future[bytes] = Future()

    # --- engine thread ---

    @property
    def address(self) -> str:
        return self._inbox.address

    @property
    def export(self) -> bytes:
        return self._started.result(timeout=0)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Raises what went wrong in registering (TransportError)."""
        self._thread.start()
        self._started.result(timeout=120)

    def submit(self, command: Command) -> None:
        self._commands.append(command)
        self._wake.set()

    def take(self, wait_s: float = 0.0) -> Results:
        """What has ended since the last call; waits so long for something to end."""
        with self._told:
            if wait_s and not self._results:
                self._told.wait(wait_s)
            results, self._results = self._results, Results()
        return results

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything that was to be stored in the pool is there; False if it took too long."""
        self._stored.clear()  # what was submitted just now is not idle yet
        self._wake.set()
        return self._pool is None or not self.alive or self._stored.wait(timeout_s)

    def close(self) -> None:
        """Stop, whatever is in flight; the process is about to end."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout=10)

    # --- loop thread ---

    def _run(self) -> None:
        try:
            for region in self._memory.regions:
                self._transport.register(region)
            if self._pool is not None:
                self._pool.open(self._context, self._transport, self._memory.scratch_extents, self._outbox)
            self._started.set_result(self._transport.export())
        except LmkvError as error:
            self._started.set_exception(error)
            self._end()
            return
        try:
            self._loop()
        except Exception:
            # A bug of ours: the loop ends, peers see silence, requests end by their deadlines on the other side.
            logger.exception("the worker loop has failed; this rank moves no KV any more")
            raise
        finally:
            self._end()

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._transport.abort()
        self._outbox.close()
        self._inbox.close()
        self._context.term()

    def _loop(self) -> None:
        poller = select.poll()
        descriptors = self._transport.fds()
        for descriptor in (self._inbox.socket.fileno(), self._wake.fd, *descriptors):
            poller.register(descriptor, select.POLLIN)
        while not self._stopping.is_set():
            self._watch_pool(poller)
            wait(poller, self._timeout_s(bool(descriptors)))
            self._wake.clear()
            now_s = time.monotonic()
            if self._transport.in_flight == 0:
                self._ended_s = now_s
            self._take_letters(now_s)
            self._take_commands(now_s)
            self._take_events(now_s)
            self._peers.tick(now_s)
            self._sending.tick(now_s)
            self._receiving.tick(now_s)
            if self._pool is not None:
                self._pool.tick(now_s)
            self._publish(now_s)

    def _watch_pool(self, poller: select.poll) -> None:
        """Nodes come and go, and their sockets with them."""
        if self._pool is None or not self._pool.fds_changed():
            return
        for descriptor in self._pool_fds:
            poller.unregister(descriptor)
        self._pool_fds = self._pool.fds
        for descriptor in self._pool_fds:
            poller.register(descriptor, select.POLLIN)

    def _timeout_s(self, has_descriptors: bool) -> float:
        if self._commands and not self._blocked():
            return 0.0
        now_s = time.monotonic()
        most = 1.0 if has_descriptors else self._pause_s(now_s)
        if self._commands:
            most = min(most, BUSY_S)
        deadlines = [d - now_s for d in (self._sending.deadline_s(), self._receiving.deadline_s()) if d is not None]
        pool_s = self._pool.next_s(now_s) if self._pool is not None else 3600.0
        return max(0.0, min([most, pool_s, self._peers.next_s(now_s), *deadlines]))

    def _pause_s(self, now_s: float) -> float:
        """Between two polls of a data plane without descriptors."""
        if self._pool is not None and self._pool.hurries(now_s):
            return PACE_S
        if self._receiving.active or self._peers.warming or (self._pool is not None and self._pool.waiting):
            return BUSY_S
        if self._transport.in_flight == 0:
            return IDLE_S
        return BUSY_S if now_s - self._ended_s < LONG_S else SLOW_S

    def _blocked(self) -> bool:
        """The next command waits for the device."""
        head = self._commands[0]
        return isinstance(head, LayersDone | Stored) and head.fence is not None and not head.fence.query()

    def _take_commands(self, now_s: float) -> None:
        while self._commands and not self._blocked():
            command = self._commands.popleft()
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
                case Expected():
                    self._receiving.expected(command.expects, now_s)
                case Abandoned():
                    self._receiving.abandoned(command.transfer_ids, now_s)
                case Preempted():
                    self._sending.preempted(command.transfer_ids, now_s)
                    self._fences.append(command)
                case _:
                    self._take_pool_command(command, now_s)

    def _take_pool_command(self, command: Command, now_s: float) -> None:
        assert self._pool is not None, "the engine side sends these only where there is a pool"
        match command:
            case Stored():
                self._pool.store(command.specs, now_s)
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
            match message:
                case wire.Beat():
                    peer = self._peers.heard(message, now_s)
                    if peer is not None:
                        self._sending.handle(ev.Heard(peer), now_s)
                        self._receiving.handle(ev.Heard(peer), now_s)
                case wire.Grant():
                    self._sending.grant_came(message, now_s)
                case wire.NotNeeded():
                    self._sending.not_needed_came(message, now_s)
                case wire.Credit():
                    self._sending.credit_came(message, now_s)
                case wire.Cancel():
                    self._sending.cancel_came(message, now_s)
                case wire.Cancelled() | wire.Failed():
                    self._receiving.answer_came(message, now_s)
                case wire.Introduce():
                    self._peers.introduce(message, now_s)
                case wire.Dismiss():
                    self._peers.dismiss(message.incarnation, message.dead)
                case wire.PoolName() if self._pool is not None:
                    self._pool.named(message)
                case _:
                    logger.warning("a worker does not take %s", type(message).__name__)

    def _take_events(self, now_s: float) -> None:
        for event in self._transport.poll():
            match event:
                case Completion(op, error):
                    self._ended_s = now_s
                    self._transport.release(op)
                    if self._peers.completed(op, error, now_s):
                        continue
                    if self._pool is None or not self._pool.completed(op, error, now_s):
                        self._sending.completed(op, error, now_s)
                case Notification(transport_id, payload):
                    self._take_note(transport_id, payload, now_s)
                case PeerLost(transport_id, reason):
                    if self._pool is not None and self._pool.peer_lost(transport_id, reason):
                        continue
                    self._peers.transport_lost(transport_id, reason)

    def _take_note(self, transport_id: PeerId, payload: bytes, now_s: float) -> None:
        peer = self._peers.peer_of(transport_id)
        try:
            note = wire.decode_note(payload)
        except WireError as error:
            logger.warning("note of %s dropped: %s", transport_id, error)
            return
        if isinstance(note, wire.WarmNote):
            return
        if peer is None:
            logger.warning("note of unknown peer %s dropped", transport_id)
            return
        self._receiving.note_came(peer, note, now_s)

    def _peer_gone(self, peer: ev.Peer, dead: bool) -> None:
        now_s = time.monotonic()
        self._sending.handle(ev.PeerGone(peer, dead), now_s)
        self._receiving.handle(ev.PeerGone(peer, dead), now_s)

    def _publish(self, now_s: float) -> None:
        for fence in self._fences:
            if all(self._sending.in_flight(tid) == 0 for tid in fence.transfer_ids):
                fence.drained.set()
        self._fences = [fence for fence in self._fences if not fence.drained.is_set()]
        sent, sent_ledgers = self._sending.take()
        reports, received_ledgers = self._receiving.take()
        fresh = Results(sent, reports, sent_ledgers + received_ledgers)
        if self._pool is not None:
            fresh.loads = self._pool.take_reports()
            fresh.packed = self._pool.take_packed()
            fresh.counted = self._pool.take_counters(now_s) or Counter()
        if self._pool is not None and self._pool.idle and not self._commands:
            self._stored.set()
        else:
            self._stored.clear()
        if fresh:
            with self._told:
                self._results.add(fresh)
                self._told.notify()
