"""The pool nodes that one rank knows: named in its settings, or told by controllers; and what it asks controllers.

One thread owns it, as it owns every access in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import zmq

from lmkv import poolwire as pw
from lmkv.errors import TransportError
from lmkv.ids import Incarnation
from lmkv.transport import OpId, PeerId

from .access import MOST_NAMESPACES, Me, NodeAccess
from .link import Link

logger = logging.getLogger(__name__)

ASK_EVERY_S = 2.0
ASK_S = 1.0
MOST_NODES = 4096
"""Nodes that are used at a time, as many as a controller follows."""


class Directory:
    """`changed()` is called when the set of ready nodes has changed; `fds_changed` tells that `fds` is another."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        me: Me,
        nodes: Sequence[str],
        controllers: Sequence[str],
        changed: Callable[[], None] = lambda: None,
        use_arenas: bool = True,
        map_arenas: bool = True,
    ) -> None:
        self._context = context
        self._me = me
        self._changed = changed
        self._use_arenas = use_arenas
        self._map_arenas = map_arenas
        self._fixed = frozenset(nodes)
        self._accesses: dict[str, NodeAccess] = {}
        self._namespaces: dict[bytes, str] = {}
        self.controllers = [Link(context, address, me.runtime.entropy) for address in controllers]
        self._answered_s = [float("-inf")] * len(controllers)
        self._listed: list[frozenset[str]] = [frozenset()] * len(controllers)
        """What each controller listed in its last answer."""
        self._asked_s = self._added_s = float("-inf")
        self.fds_changed = True
        for address in nodes:
            self._add(address)

    # --- questions ---

    def ready(self) -> Iterator[NodeAccess]:
        return (access for access in self._accesses.values() if access.ready)

    def find(self, incarnation: Incarnation) -> NodeAccess | None:
        """The ready node of that incarnation."""
        return next((access for access in self.ready() if access.incarnation == incarnation), None)

    def controller(self, now_s: float) -> Link | None:
        """One that has answered lately."""
        for link, answered_s in zip(self.controllers, self._answered_s, strict=True):
            if now_s - answered_s < 3 * ASK_EVERY_S:
                return link
        return None

    @property
    def fds(self) -> list[int]:
        links = [*self.controllers, *(access.link for access in self._accesses.values())]
        return [link.fd for link in links]

    # --- life ---

    def declare(self, namespace: bytes, description: str) -> None:
        self._namespaces[namespace] = description
        while len(self._namespaces) > MOST_NAMESPACES:
            del self._namespaces[next(iter(self._namespaces))]
        for access in self._accesses.values():
            access.declare(namespace, description)

    def tick(self, now_s: float) -> None:
        for link in self.controllers:
            link.receive(now_s)
        if self.controllers and now_s - self._asked_s >= ASK_EVERY_S:
            self._asked_s = now_s
            for i, link in enumerate(self.controllers):
                link.ask(
                    pw.Members,
                    pw.MembersAre,
                    lambda answer, i=i: self._members(i, answer, now_s),  # type: ignore[misc]
                    now_s + ASK_S,
                )
        if now_s - self._added_s >= ASK_EVERY_S:  # there may have been no socket for one
            self._added_s = now_s
            for address in self._fixed - self._accesses.keys():
                self._add(address)
        for access in list(self._accesses.values()):
            access.tick(now_s)

    def next_s(self, now_s: float) -> float:
        waits = [access.next_s(now_s) for access in self._accesses.values()]
        if self.controllers:
            waits += [max(0.0, self._asked_s + ASK_EVERY_S - now_s), *(c.next_s(now_s) for c in self.controllers)]
        return max(0.0, min(waits, default=3600.0))

    def _members(self, index: int, answer: pw.MembersAre | None, now_s: float) -> None:
        if answer is None:
            return
        self._answered_s[index] = now_s
        told = frozenset(member.card.address for member in answer.nodes)
        self._listed[index] = told
        # Of several controllers, another may still see a node that this one does not.
        for address in self._accesses.keys() - self._fixed.union(*self._listed):
            access = self._accesses[address]
            if not (access.ready or len(access.fetching) or access.link.has_slots_out):
                self._accesses.pop(address).close()
                self.fds_changed = True
        for address in sorted(told - self._accesses.keys()):
            if len(self._accesses) >= MOST_NODES:
                logger.warning("more than %d pool nodes: %s is not used", MOST_NODES, address)
                break
            self._add(address)

    def _add(self, address: str) -> None:
        try:
            access = NodeAccess(
                self._context, address, self._me, self._changed, map_arena=self._map_arenas, use_arena=self._use_arenas
            )
        except zmq.ZMQError as error:  # tried again
            logger.warning("pool node %s is not used: %s", address, error)
            return
        for namespace, description in self._namespaces.items():
            access.declare(namespace, description)
        self._accesses[address] = access
        self.fds_changed = True

    # --- the data plane ---

    def completed(self, op: OpId, error: TransportError | None) -> bool:
        """True: it was the warming of a node."""
        return any(access.completed(op, error) for access in self._accesses.values())

    def take_fetched(self) -> list[tuple[OpId, TransportError | None]]:
        """Of all nodes: see `NodeAccess.fetch`."""
        return [ended for access in self._accesses.values() for ended in access.fetching.take()]

    def take_lost(self) -> list[OpId]:
        """Fetches whose nodes are lost: see `Fetching.take_lost`."""
        return [op for access in self._accesses.values() for op in access.fetching.take_lost()]

    def overdue(self, now_s: float, limit_s: float) -> list[str]:
        return [name for access in self._accesses.values() for name in access.fetching.overdue(now_s, limit_s)]

    def replaced(self) -> None:
        for access in self._accesses.values():
            access.replaced()

    def peer_lost(self, peer: PeerId, reason: str) -> bool:
        return any(access.peer_lost(peer, reason) for access in self._accesses.values())

    def close(self) -> None:
        for link in self.controllers:
            link.close()
        for access in self._accesses.values():
            access.close()
