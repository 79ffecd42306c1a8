"""What the worker loop does with the letters of peers and of its own engine. Loop thread only."""

from __future__ import annotations

import logging

from lmkv import wire
from lmkv.control.mailbox import GOODBYE_MS, Outbox
from lmkv.ids import Rank
from lmkv.transfer import events as ev

from .peers import Peers
from .pooled.rank import PoolRank
from .receiving import Receiving
from .sending import Sending

logger = logging.getLogger(__name__)

BROKEN = "the worker loop of rank {} has failed; its log has more"
"""What an engine says of itself from then on."""


class Letters:
    """Gives each letter to the part that it is for. `pool` is None where the rank does not use one."""

    def __init__(
        self,
        rank: Rank,
        peers: Peers,
        sending: Sending,
        receiving: Receiving,
        pool: PoolRank | None,
        outbox: Outbox,
    ) -> None:
        self._rank = rank
        self._peers = peers
        self._sending = sending
        self._receiving = receiving
        self._pool = pool
        self._outbox = outbox

    def take(self, message: wire.Control, now_s: float) -> None:
        match message:
            case wire.Beat():
                peer = self._peers.heard(message, now_s)
                if peer is not None:
                    self._sending.handle(ev.Heard(peer), now_s)
                    self._receiving.handle(ev.Heard(peer), now_s)
            case wire.Warmed():
                if self._peers.confirmed(message):
                    self._sending.confirmed(message.incarnation, now_s)
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
                self._sending.introduced(message.card.incarnation, now_s)
                if self._peers.is_confirmed(message.card.incarnation):  # as where no rank of it is written to
                    self._sending.confirmed(message.card.incarnation, now_s)
            case wire.Dismiss():
                self._peers.dismiss(message.incarnation, message.dead)
            case wire.PoolName() if self._pool is not None:
                self._peers.engine_address = message.address
                self._pool.named(message)
            case _:
                logger.warning("a worker does not take %s", type(message).__name__)

    def say_broken(self) -> None:
        """The loop has failed: its engine hears of it even if it takes no step. Closes the outbox."""
        if self._peers.engine_address:
            self._outbox.send(self._peers.engine_address, wire.Broken(self._rank, BROKEN.format(self._rank)))
            self._outbox.close(GOODBYE_MS)
