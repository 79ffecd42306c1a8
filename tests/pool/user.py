"""A client of a pool node for tests: synchronous, with pages whose bytes follow from their keys."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np
import xxhash
import zmq
from numpy.typing import NDArray

from lmkv import poolwire as pw
from lmkv.hashing import Manifest, page_key
from lmkv.ids import Incarnation, Rank, make_incarnation
from lmkv.pool.access import Me, NodeAccess
from lmkv.poolwire import Ack, Refusal

MANIFEST = Manifest({"model": "test"}, 128, ("bytes",))
NAMESPACE = MANIFEST.namespace()


class NodeGone(Exception):
    """The node does not answer any more."""


def content(key: bytes, size: int) -> NDArray[np.uint8]:
    """What a page with that key holds."""
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def checksum(data: NDArray[np.uint8]) -> int:
    return xxhash.xxh3_64(data.tobytes()).intdigest()


def make_key(number: int) -> bytes:
    return page_key(hashlib.blake2b(b"%d" % number, digest_size=16).digest(), 0)


class PoolUser:
    """Attached to one node until `close`. Every call raises NodeGone if the node has died."""

    def __init__(self, address: str, page_bytes: int, seed: int = 0, deadline_s: float = 10.0) -> None:
        self.page_bytes = page_bytes
        self.wait_s = 10.0
        """Of commits that want more than VOLATILE."""
        self.incarnation: Incarnation = make_incarnation(hashlib.blake2b(b"user-%d" % seed, digest_size=8).digest())
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._access = NodeAccess(self._context, address, Me(self.incarnation, Rank(0), f"user-{seed}"))
        self._access.declare(NAMESPACE, MANIFEST.description())
        self._attached = False
        self._until(lambda: self._access.ready, deadline_s)
        self._attached = True

    def __enter__(self) -> PoolUser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._access.close()
        self._context.term()

    def _until(self, condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
        until_s = time.monotonic() + deadline_s
        poller = zmq.Poller()
        poller.register(self._access.link.fd, zmq.POLLIN)
        while not condition():
            poller.poll(5)
            self._access.tick(time.monotonic())
            if time.monotonic() > until_s or (self._attached and not self._access.ready):
                raise NodeGone

    def ask(
        self, question: Callable[[int], pw.PoolMessage], kind: type[pw.PoolMessage], deadline_s: float = 10.0
    ) -> pw.PoolMessage:
        answers: list[pw.PoolMessage | None] = []
        self._access.link.ask(question, kind, answers.append, time.monotonic() + deadline_s)
        self._until(lambda: bool(answers), deadline_s)
        if answers[0] is None:
            raise NodeGone
        return answers[0]

    # --- what an engine does ---

    def reserve(self, keys: Sequence[bytes]) -> pw.Reserved:
        joined = b"".join(keys)
        answer = self.ask(
            lambda t: pw.Reserve(t, self.incarnation, Rank(0), NAMESPACE, joined, self.page_bytes, 1, 0), pw.Reserved
        )
        assert isinstance(answer, pw.Reserved)
        return answer

    def fill(self, key: bytes, offset: int) -> int:
        data = content(key, self.page_bytes)
        self._access.view(offset, self.page_bytes)[:] = data
        return checksum(data)

    def commit(self, keys: Sequence[bytes], slots: Sequence[pw.Slot], sums: Sequence[int], ack: Ack) -> pw.Committed:
        joined, generations = b"".join(keys), tuple(slot.generation for slot in slots)
        answer = self.ask(
            lambda t: pw.Commit(
                t,
                self.incarnation,
                Rank(0),
                NAMESPACE,
                joined,
                generations,
                0,
                tuple((s,) for s in sums),
                ack,
                self.wait_s,
            ),
            pw.Committed,
        )
        assert isinstance(answer, pw.Committed)
        return answer

    def store(self, keys: Sequence[bytes], ack: Ack = Ack.VOLATILE) -> dict[bytes, Ack]:
        """By key that is there now because of us: the class that was acknowledged."""
        slots = self.reserve(keys).slots
        new = [(key, slot) for key, slot in zip(keys, slots, strict=True) if slot.refusal is Refusal.NONE]
        if not new:
            return {}
        sums = [self.fill(key, slot.offset) for key, slot in new]
        done = self.commit([key for key, _ in new], [slot for _, slot in new], sums, ack)
        taken = [key for (key, _), why in zip(new, done.refusals, strict=True) if why is Refusal.NONE]
        return dict.fromkeys(taken, done.reached)

    def load(self, key: bytes, wait_s: float = 5.0) -> bool:
        """True: it is there, and right. AssertionError: it is there and wrong, checksum included."""
        answer = self.ask(
            lambda t: pw.Pin(t, self.incarnation, Rank(0), NAMESPACE, key, 10.0, wait_s), pw.Pinned, wait_s + 10.0
        )
        assert isinstance(answer, pw.Pinned)
        if not answer.pages:
            return False
        data = self._access.view(answer.pages[0].offset, self.page_bytes).copy()
        self._access.link.tell(pw.Unpin(answer.lease))
        right = content(key, self.page_bytes)
        assert answer.pages[0].checksums == (checksum(right),), "the index has another page's checksum"
        assert np.array_equal(data, right), f"page {key.hex()} has wrong bytes"
        return True

    def drop(self, keys: Sequence[bytes]) -> int:
        answer = self.ask(lambda t: pw.Drop(t, NAMESPACE, b"".join(keys)), pw.Dropped)
        assert isinstance(answer, pw.Dropped)
        return answer.pages
