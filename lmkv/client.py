"""The pool without an engine: KV of token sequences, stored and retrieved as tensors.

    with LmkvClient("tcp://127.0.0.1:18300", layers=2, heads=4, head_dim=64, model="my-model") as pool:
        pool.store(tokens, kv)                  # kv: [layers, 2, heads, tokens, head_dim]
        kv, count = pool.retrieve(tokens)       # of the first `count` tokens

Whatever is wrong with the pool is a miss, counted in `counters`: a node that does not answer, a page that was evicted,
a lease that ran out, bytes with another checksum. Only what the caller did wrong raises. A client belongs to the thread
that made it, every call ends by its deadline, and nothing runs between calls.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from . import poolwire as pw
from ._client_nodes import Bytes, Nodes
from ._client_pages import Pages, Sums
from .errors import ConfigError, PoolError
from .hashing import CHUNK_TOKENS, Chain, Manifest, group_shape, page_key
from .ids import Rank
from .pool.access import NodeAccess
from .poolwire import Ack, Refusal

if TYPE_CHECKING:
    import torch

__all__ = ["Ack", "LmkvClient", "StoreResult"]

BATCH_BYTES = 64 << 20
"""So much is reserved at a time, to be written well within the lease."""
CONNECT_S = 5.0
LEASE_S = 60.0


class NoNodeError(PoolError):
    """No pool node could be reached when a client was opened."""

    code = "LMKV-P803"


@dataclass(slots=True)
class StoreResult:
    """Of the full chunks of a sequence: `stored` are new, `existed` were there, `refused` says by reason how many are
    not in the pool (`full`, `busy`, `unreachable`, …). `reached`: what all new ones have reached."""

    stored: int = 0
    existed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    reached: Ack = Ack.VOLATILE

    @property
    def complete(self) -> bool:
        return not self.refused


class LmkvClient:
    """`address`: of a pool node, or of several; those of this host are used by mapping their memory, others over
    `transport` (as `nixl://?progress=event` or `tcp://`; without one they are not used).

    The model: `layers`, `heads` (of keys and values) and `head_dim`, or `layers` and `latent_dim` for MLA, and `dtype`.
    KV is shared by clients for which all of that is equal, and `model`, `weights` (a digest), `tenant`, `chunk_tokens`
    and `must` (whatever else decides what the numbers mean: rope, quantization, …). `salt` as in
    `lmkv.hashing`.

    Raises ConfigError, LayoutError, SchemeError; NoNodeError when no node can be reached within `connect_s`.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        layers: int,
        heads: int = 0,
        head_dim: int = 0,
        latent_dim: int = 0,
        dtype: str = "bfloat16",
        model: str = "",
        weights: str = "",
        tenant: str = "",
        must: Mapping[str, str] | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        salt: bytes = b"",
        transport: str = "",
        name: str = "client",
        timeout_s: float = 5.0,
        wait_s: float = 1.0,
        lease_s: float = LEASE_S,
        connect_s: float = CONNECT_S,
    ) -> None:
        """`timeout_s` bounds each call's waiting for answers and bytes, `wait_s` that for pages on a node's disk."""
        addresses = [address] if isinstance(address, str) else list(address)
        if not addresses:
            raise ConfigError("no address of a pool node was given", hint="pass tcp://HOST:PORT")
        if bool(latent_dim) == bool(heads or head_dim):
            raise ConfigError("the model's KV has no shape", hint="give heads and head_dim, or latent_dim for MLA")
        self.counters: Counter[str] = Counter()
        self.chunk_tokens = chunk_tokens
        self._salt = salt
        self._timeout_s, self._wait_s, self._lease_s = timeout_s, wait_s, lease_s
        Chain(b"", chunk_tokens)  # raises for a size that cannot be
        parts, dims = (1, latent_dim) if latent_dim else (2, head_dim)
        self._pages = Pages(layers, parts, heads or 1, dims, dtype, chunk_tokens)
        said = {**(must or {}), "model": model, "weights": weights, "client": "tensors"}
        manifest = Manifest(said, chunk_tokens, (group_shape(self._pages.geometry),), tenant)
        self.namespace = manifest.namespace()
        self._nodes = Nodes(addresses, name, transport, self._pages.bytes)
        self._nodes.declare(self.namespace, manifest.description())
        if not self._nodes.wait(self._nodes.ready, time.monotonic() + connect_s):
            self._nodes.close()
            raise NoNodeError(
                f"no pool node can be used at {', '.join(addresses)} within {connect_s:g} s",
                hint="start one with `lmkv pool`; for one on another host give transport= as well",
            )

    def __enter__(self) -> LmkvClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._nodes.close()

    # --- looking up ---

    def lookup(self, tokens: Sequence[int]) -> int:
        """How many tokens, from the first on, can be retrieved. Pages on a node's disk are brought up first."""
        found = self._pin(self._keys(tokens))
        for node, pinned in found:
            _unpin(node, pinned)
        return max((len(pinned.pages) for _, pinned in found), default=0) * self.chunk_tokens

    def retrieve(self, tokens: Sequence[int], into: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        """KV of the longest beginning that is in the pool, and the number of its tokens. With `into` (KV for all the
        tokens) it is written there, and what lies behind that number has no meaning; else a tensor of that size."""
        if into is not None:
            self._pages.check(into, len(tokens))
        asked_s, keys = time.monotonic(), self._keys(tokens)
        found = self._pin(keys)
        best = max(found, key=lambda pair: len(pair[1].pages), default=None)
        for node, pinned in found:
            if best is not None and pinned is not best[1]:
                _unpin(node, pinned)
        count = len(best[1].pages) * self.chunk_tokens if best is not None else 0
        kv = into if into is not None else self._pages.empty(count)
        chunks = self._load(*best, keys, kv, asked_s) if best is not None else 0
        self.counters["retrieved"] += chunks
        tokens_here = chunks * self.chunk_tokens
        return (kv if into is not None else kv[:, :, :, :tokens_here]), tokens_here

    def _pin(self, keys: list[bytes]) -> list[tuple[NodeAccess, pw.Pinned]]:
        """What each node has of them."""
        nodes = self._nodes.ready()
        if not keys or not nodes:
            self.counters.update(["unreachable"] * (not nodes))
            return []
        mine, until_s = (self._nodes.incarnation, Rank(0)), time.monotonic() + self._timeout_s + self._wait_s
        whole = b"".join(keys)
        before = [node.incarnation for node in nodes]
        answers = self._nodes.ask(
            nodes,
            lambda token: pw.Pin(token, *mine, self.namespace, whole, self._lease_s, self._wait_s),
            pw.Pinned,
            until_s,
        )
        found = []
        for node, incarnation, answer in zip(nodes, before, answers, strict=True):
            if answer is None or node.incarnation != incarnation:
                self.counters["unreachable"] += 1
            elif answer.pages and answer.page_bytes != self._pages.bytes:
                self.counters["foreign"] += 1
                _unpin(node, answer)
            elif answer.pages:
                found.append((node, answer))
        return found

    def _load(self, node: NodeAccess, pinned: pw.Pinned, keys: list[bytes], kv: torch.Tensor, asked_s: float) -> int:
        """How many pages have come, whole and right, from the first on."""
        until_s = time.monotonic() + self._timeout_s
        incarnation, corrupt, chunks = node.incarnation, b"", 0
        for page in pinned.pages:
            sums = self._nodes.read(node, page.offset, self._into(kv, chunks), until_s)
            if sums is None or node.incarnation != incarnation:
                self.counters["unreachable"] += 1
                break
            if time.monotonic() > asked_s + pinned.lease_s:
                self.counters["expired"] += 1  # the slot may have had other bytes meanwhile
                break
            if sums != page.checksums:
                self.counters["corrupt"] += 1
                corrupt = keys[chunks]
                break
            chunks += 1
        _unpin(node, pinned, self.namespace, corrupt)
        return chunks

    # --- storing ---

    def store(
        self, tokens: Sequence[int], kv: torch.Tensor, *, ack: Ack = Ack.VOLATILE, ack_wait_s: float = 10.0
    ) -> StoreResult:
        """KV of all the tokens, of which full chunks are kept. `ack`: wait (for `ack_wait_s`) until so much is reached;
        the result says what was."""
        self._pages.check(kv, len(tokens))
        keys, result, reached = self._keys(tokens), StoreResult(), []
        nodes = self._nodes.ready()
        batch = max(1, BATCH_BYTES // self._pages.bytes)
        for first in range(0, len(keys), batch):
            some = keys[first : first + batch]
            if nodes:
                reached.append(self._store(nodes[0], some, kv, first, ack, ack_wait_s, result))
            else:
                result.refused["unreachable"] += len(some)
        result.reached = min((one for one in reached if one is not None), default=Ack.VOLATILE)
        self.counters["stored"] += result.stored
        self.counters.update({f"refused:{why}": count for why, count in result.refused.items()})
        return result

    def _store(
        self,
        node: NodeAccess,
        keys: list[bytes],
        kv: torch.Tensor,
        first: int,
        ack: Ack,
        ack_wait_s: float,
        result: StoreResult,
    ) -> Ack | None:
        """What those that are new have reached; None: there are none."""
        bond, asked_s = node.bond, time.monotonic()
        mine = (self._nodes.incarnation, Rank(0), self.namespace, b"".join(keys))
        (reserved,) = self._nodes.ask(
            [node],
            lambda token: pw.Reserve(token, *mine, self._pages.bytes, 1, 0),
            pw.Reserved,
            asked_s + self._timeout_s,
        )
        if reserved is None:
            result.refused["unreachable"] += len(keys)
            return None
        left, written = [], []
        for i, slot in enumerate(reserved.slots):
            if slot.refusal is Refusal.NONE:
                left.append((keys[i], slot, first + i))
            elif slot.refusal is Refusal.EXISTS:
                result.existed += 1
            else:
                result.refused[slot.refusal.name.lower()] += 1
        until_s = asked_s + min(reserved.lease_s, self._timeout_s)
        try:
            while left and time.monotonic() < until_s and (node.ready, node.bond) == (True, bond):
                key, slot, chunk = left.pop(0)
                sums = self._write(node, key, slot, chunk, kv, until_s, bond)
                if sums is None:
                    result.refused["unreachable"] += 1
                else:
                    written.append((key, slot.generation, sums))
        except BaseException:
            for key, generation, _ in written:
                self._abandon(node, key, generation, drained=True)
            raise
        finally:
            for key, slot, _ in left:
                result.refused["unreachable"] += 1
                self._abandon(node, key, slot.generation, drained=True)
        return self._commit(node, written, ack, ack_wait_s, result)

    def _write(
        self, node: NodeAccess, key: bytes, slot: pw.Slot, chunk: int, kv: torch.Tensor, until_s: float, bond: int
    ) -> Sums | None:
        sums = self._nodes.write(
            node,
            slot.offset,
            lambda page: self._pages.pack(kv, chunk, page),
            until_s,
            drained=lambda: self._abandon(node, key, slot.generation, drained=True),
            bond=bond,
        )
        if sums is None:
            self._abandon(node, key, slot.generation, drained=False)  # (if it was not said already that it is)
        return sums

    def _abandon(self, node: NodeAccess, key: bytes, generation: int, drained: bool) -> None:
        mine = (self._nodes.incarnation, Rank(0), self.namespace)
        node.link.tell(pw.Abandon(*mine, key, (generation,), drained))

    def _commit(
        self,
        node: NodeAccess,
        written: list[tuple[bytes, int, Sums]],
        ack: Ack,
        ack_wait_s: float,
        result: StoreResult,
    ) -> Ack | None:
        if not written:
            return None
        keys, generations, sums = zip(*written, strict=True)
        mine = (self._nodes.incarnation, Rank(0), self.namespace, b"".join(keys), generations)
        wait_s = ack_wait_s if ack is not Ack.VOLATILE else 0.0
        (done,) = self._nodes.ask(
            [node],
            lambda token: pw.Commit(token, *mine, 0, sums, ack, wait_s),
            pw.Committed,
            time.monotonic() + self._timeout_s + wait_s,
        )
        if done is None:
            result.refused["unreachable"] += len(written)
            return None
        new = sum(why is Refusal.NONE for why in done.refusals)
        result.stored += new
        result.refused.update(why.name.lower() for why in done.refusals if why is not Refusal.NONE)
        return done.reached if new else None

    # --- inside ---

    def _keys(self, tokens: Sequence[int]) -> list[bytes]:
        return [page_key(key, 0) for key in Chain(self.namespace, self.chunk_tokens, self._salt).extend(tokens)]

    def _into(self, kv: torch.Tensor, chunk: int) -> Callable[[Bytes], Sums]:
        return lambda page: self._pages.unpack(page, kv, chunk)


def _unpin(node: NodeAccess, pinned: pw.Pinned, namespace: bytes = b"", corrupt: bytes = b"") -> None:
    node.link.tell(pw.Unpin(pinned.lease, namespace, corrupt))
