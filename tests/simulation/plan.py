"""What a seed makes of a world: its engines, nodes, settings, faults and load."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from .kinds import EngineKind

CHUNK = 32
REQUESTS = 380
FEW_SLOTS = 2
"""Landing slots a rank, where there are few."""
PATIENT = 0.15
"""Share of stepped worlds in which all that could be loaded has to be, whatever else is drawn."""


@dataclass(frozen=True, slots=True)
class WorldPlan:
    """`prefills` and `decodes` are engines by kind; the rest says what is drawn for a world."""

    seed: int
    prefills: tuple[EngineKind, ...]
    decodes: tuple[EngineKind, ...]
    nodes: int
    threaded: bool
    faults: bool
    spoils: bool
    """Faults may change bytes on their way: all are checked then."""
    is_unlike: bool
    """Decode engines get KV in another layout: it lands in slots and is converted."""
    requests: int
    gentle_s: float
    pd: float
    abort: float
    late: float
    transport: str
    """Of the stepped gear: how finely copies are sliced."""
    node_kib: int
    outputs: tuple[int, ...]
    """Lengths of answers."""
    longest: int
    """Tokens of the longest prompt: with its answer it has to fit into each cache."""
    updates: int
    """How often the weights of all engines are replaced, one engine after the other."""
    odd: float
    """Share of requests whose transfer says something that it must not."""
    slowness: float
    """Of the link between engines (stepped gear)."""
    slow_ops: float
    """Share of ops that take long while all others go on (stepped gear)."""
    stands_still: bool
    """Devices do while their engine waits in a hook (stepped gear), so that it waits in vain: as one that hangs."""
    stops: float
    """Share of clients that have read enough before the end of their answer."""
    impatient: float
    """Share of clients that go away while their prompt is loaded."""
    node: dict[str, Any] = field(default_factory=dict)
    """Settings of pool nodes, but for their size."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_patient(self) -> bool:
        """Nothing goes wrong, nothing hangs, nobody gives up, and there are slots for more than one writer: all that
        could be loaded has to be."""
        slots = self.settings["landing_bytes"] // self.settings["landing_slot_bytes"]
        has_slots = not self.is_unlike or slots > FEW_SLOTS
        waits = self.settings["hold_s"] >= 30 and self.settings["load_s"] >= 30
        hangs = self.stands_still or self.slow_ops > 0
        return has_slots and waits and not (self.faults or self.updates or hangs)

    def describe(self) -> str:
        engines = " ".join(
            f"{k.role[3:]}:{k.block_tokens}x{k.blocks}tp{k.ranks}{'a' if k.is_async else ''}{'v2' if k.is_v2 else ''}"
            for k in (*self.prefills, *self.decodes)
        )
        flags = [name for name in ("threaded", "faults", "is_unlike") if getattr(self, name)]
        flags += [f"{self.updates} updates"] * bool(self.updates)
        return f"seed {self.seed}: {engines} nodes {self.nodes} {' '.join(flags)}"


def draw(seed: int, requests: int = REQUESTS) -> WorldPlan:
    """Every seventh world runs on real threads. Of the others some are made patient, few are by chance."""
    rnd = random.Random(f"world-{seed}")
    threaded = seed % 7 == 3
    patient = not threaded and random.Random(f"patient-{seed}").random() < PATIENT
    is_unlike = rnd.random() < 0.4
    ranks = rnd.choice([1, 1, 1, 2])
    block = rnd.choice([8, 16, 32, 32])
    both = rnd.random() < 0.2
    nodes = rnd.choice([1, 1, 2]) if rnd.random() < 0.6 else 0
    tiny = rnd.random() < 0.75
    more = random.Random(f"more-{seed}")

    def kind(role: str, block_tokens: int, count: int) -> EngineKind:
        tokens = rnd.choice([512, 576, 704]) if tiny else rnd.choice([3000, 6000])
        return EngineKind(
            "kv_both" if both else role,
            block_tokens,
            tokens // block_tokens,
            count,
            is_async=rnd.random() < 0.5,
            is_v2=rnd.random() < 0.5,
            step_tokens=rnd.choice([32, 48, 64] if tiny else [64, 128, 256, 512]),
            most_requests=rnd.choice([4, 8, 16]),
            chunk_limit=more.choice([0, 16, 24]) if tiny else 0,
            overcommits=tiny and more.random() < 0.5,
        )

    other_block = rnd.choice([8, 8, 16, 32, 64]) if is_unlike else block
    other_ranks = 3 - ranks if is_unlike and (other_block == block or rnd.random() < 0.4) else ranks
    prefills = tuple(kind("kv_producer", block, ranks) for _ in range(rnd.choice([1, 1, 2, 3])))
    decodes = tuple(kind("kv_consumer", other_block, other_ranks) for _ in range(rnd.choice([1, 1, 2, 3])))
    settings: dict[str, Any] = {
        "chunk_tokens": CHUNK,
        "min_post_bytes": rnd.choice([1, 2048, 1 << 20]),
        "max_post_bytes": rnd.choice([1024, 4096, 1 << 20]),
        "max_inflight_bytes": rnd.choice([2048, 16384, 1 << 20]),
        "hold_s": rnd.choice([0.3, 1.0] if threaded else [0.3, 1.0, 30.0, 120.0, 120.0]),
        "min_remote_tokens": rnd.choice([1, 16]),
        "min_pool_tokens": rnd.choice([16, 64]),
        "staging_bytes": 1 << 20,
        "load_s": rnd.choice([0.0004, 0.001, 30.0, 30.0, 30.0, 30.0]),
    }
    verify = more.choice(["auto", "auto", "auto", "sample", "off"])
    settings["kv_verify"] = "auto" if threaded else verify
    settings["kv_verify_share"] = 0.3
    if settings["kv_verify"] != "auto":
        settings["hold_s"] = 120.0  # else such engines refuse each other
    slot_bytes = settings["landing_slot_bytes"] = more.choice([4096, 16384])
    settings["landing_bytes"] = slot_bytes * more.choice([FEW_SLOTS, FEW_SLOTS, 4, 16])
    settings["lookup_ms"] = more.choice([20.0, 200.0])
    updates = 0 if threaded else more.choice([0, 0, 0, 1, 2])
    if patient:
        settings |= {"hold_s": 120.0, "load_s": 30.0, "landing_bytes": 16 * slot_bytes}
        updates = 0
    if updates:
        settings["on_reset"] = more.choice(["count", "count", "new_epoch"])
    faults = rnd.random() < 0.55 and not patient
    return WorldPlan(
        seed,
        prefills,
        decodes,
        nodes,
        threaded,
        faults=faults,
        spoils=faults and settings["kv_verify"] == "auto" and more.random() < 0.6,
        is_unlike=is_unlike,
        requests=requests // 3 if threaded else requests,
        gentle_s=rnd.choice([0.01, 0.02, 0.1] if tiny else [0.01, 0.05, 0.2]),
        pd=rnd.choice([0.3, 0.5, 0.7] if tiny else [0.5, 0.8, 1.0]) if not (nodes and rnd.random() < 0.4) else 0.0,
        abort=rnd.choice([0.05, 0.1, 0.25]),
        late=rnd.choice([0.05, 0.2, 0.4]),
        transport=f"inproc://?piece_bytes={rnd.choice([256, 1024, 4096, 1 << 20])}",
        node_kib=rnd.choice([96, 96, 192, 192, 1024, 8192]),
        outputs=more.choice([(4, 8, 24, 40), (12, 24, 48), (24, 64, 120)]) if tiny else (1, 2, 3, 5, 8, 16),
        longest=320 if tiny else 600,
        updates=updates,
        odd=more.choice([0.0, 0.05]),
        stops=more.choice([0.0, 0.1, 0.5]),
        impatient=more.choice([0.0, 0.1, 0.3]),
        node={
            "policy": more.choice(["lru", "s3fifo"]),
            "write_lease_s": more.choice([30.0, 0.02, 0.005]),
            "most_lease_s": more.choice([60.0, 0.8]),
        },
        slowness=more.choice([1.0, 1.0, 10.0, 40.0]),
        slow_ops=more.choice([0.0, 0.05, 0.1]) if not patient else 0.0,
        stands_still=more.random() < 0.25 and not patient,
        settings=settings,
    )
