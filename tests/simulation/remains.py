"""What engines and pool nodes still hold when nothing is under way any more."""

from __future__ import annotations

from typing import Any

from lmkv.pool.node import PoolNode

from .engine import SimEngine


def _told(owner: str, counts: dict[str, Any]) -> list[str]:
    return [f"{owner}: {n} {what}" for what, n in counts.items() if n]


def of_engine(engine: SimEngine) -> list[str]:
    """Blocks, requests, transfers, slots, staging and operations; empty when all have come back."""
    found = engine.leaks()
    half = engine.scheduler.connector._scheduler
    found += _told(
        engine.name,
        {
            "requests in the prefill half": len(half._prefill._requests),
            "transfers in the decode half": len(half._decode._transfers),
            "connections of the endpoint": len(half._endpoint._outbox),
            "requests in the pool's half": len(half._pool._requests) if half._pool is not None else 0,
        },
    )
    for rank in engine.runner.ranks:
        found += _told(f"{engine.name} rank {rank.number}", _of_worker(rank.connector._worker))
    return found


def _of_worker(worker: Any) -> dict[str, int]:
    loop = worker._loop
    landing = loop._receiving._landing
    counts = {
        "requests that are to be reported as sent": len(worker._reportable | worker._ended | worker._sent),
        "requests that wait for their KV": len(worker._awaited),
        "loads from the pool": len(worker._pooled._loads),
        "stores": len(worker._pooled.storing) + len(worker._pooled._packing) + len(worker._pooled._holds),
        "transfers that are being sent": loop._sending._machine.active,
        "transfers that are being received": loop._receiving._machine.active,
        "landing slots lent": (landing._slots.count if landing._slots else 0) - landing._ring.free,
        # A peer that is lost without proof is probed each second: that is none of what remains.
        "operations in flight": loop._transport.in_flight - len(loop._peers._warming._ops),
        "commands": len(loop._commands),
        "fences": len(loop._fences),
    }
    if loop._pool is not None:
        counts["staging slots"] = loop._pool._staging.count - len(loop._pool._staging._free)
    return counts


def of_node(name: str, node: PoolNode) -> list[str]:
    return _told(
        name,
        {
            "leases": len(node._leases),
            "bytes pinned": node._leases.pinned_bytes,
            "pages reserved": node._index.reserved,
            "bytes in quarantine": node._index.quarantined_bytes,
            "pages held": sum(1 for entry in node._index.entries() if entry.holds),
            "letters unanswered": len(node._desk._pins) + len(node._desk._commits),
            "operations in flight": node._transport.in_flight if node._transport is not None else 0,
        },
    )
