"""What becomes of work of the worker loop that a bug kept from being done: nobody waits for it. Loop thread only."""

from __future__ import annotations

from lmkv import wire
from lmkv.ids import Incarnation, TransferId
from lmkv.transport import Event, Notification

from .commands import (
    Abandoned,
    Command,
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
    Yielded,
)
from .peers import Peers
from .pooled.rank import PoolRank
from .receiving import Receiving
from .sending import Sending
from .specs import LoadReport

BUG = "a bug of lmkv's worker loop; its log has more"


class Failures:
    """Dismisses one failed item at a time; `take` hands over what is to be reported for them."""

    def __init__(self, peers: Peers, sending: Sending, receiving: Receiving, pool: PoolRank | None) -> None:
        self._peers = peers
        self._sending = sending
        self._receiving = receiving
        self._pool = pool
        self._results = Results()

    def take(self) -> Results:
        results, self._results = self._results, Results()
        return results

    def command(self, command: Command, now_s: float) -> None:
        """A bug kept it from being done: nobody may wait for it."""
        match command:
            case LayersDone() | Ready() | StepDone():
                self._sending.withdrawn(tuple((push.transfer_id, BUG) for push in command.pushes), now_s)
            case Yielded(tid):
                self._sending.withdrawn(((tid, BUG),), now_s)
            case Preempted():
                self._sending.withdrawn(tuple((tid, BUG) for tid in command.transfer_ids), now_s)
            case Offered((offer,)):
                self._sending.withdrawn(((offer.transfer_id, BUG),), now_s)
                if self._sending.in_flight(offer.transfer_id) == 0:
                    self._results.sent.append(offer.request_id)
            case Expected((spec,)):
                self._receiving.fail(spec.transfer_id, spec, BUG)
                self._receiving.abandoned((spec.transfer_id,), now_s)
            case Abandoned((tid,)):
                self._receiving.fail(tid, None, BUG)
            case Loading((load,)):
                self._results.loads.append(LoadReport(load.request_id, load.tokens[0], BUG, 0, 0.0))
            case Stored((store,)):
                if self._pool is not None:
                    self._pool.drop((store.request_id,), now_s)  # first: what has been packed is read no more
                self._results.packed.append(store.request_id)
            case Overwritten() if self._pool is not None:
                self._pool.drop(command.request_ids, now_s)
                command.drained.set()

    def letter(self, message: wire.Control) -> None:
        """Its sender makes trouble: our engine is told that we are no pair."""
        reason = f"{type(message).__name__}: {BUG}"
        if isinstance(message, wire.Introduce):
            incarnation = message.card.incarnation
            self._peers.tell_engine(message, reason)
        else:
            incarnation = getattr(message, "incarnation", Incarnation(""))
        self._peers.part(incarnation, reason)

    def event(self, event: Event, tid: TransferId | None, now_s: float) -> None:
        """`tid`: the transfer whose write has completed."""
        peer = self._peers.peer_of(event.peer) if isinstance(event, Notification) else None
        if tid is not None:
            self._sending.withdrawn(((tid, BUG),), now_s)
        elif peer is not None:
            self._peers.part(peer.incarnation, BUG)
