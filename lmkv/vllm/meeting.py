"""What one of our ranks has to do with the ranks of another engine: pure, computed from both cards."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmkv.ids import Rank
from lmkv.transfer.routes import Heads, engine_routes
from lmkv.wire import EngineCard

from .fingerprint import is_direct


@dataclass(frozen=True, slots=True)
class Meeting:
    """`sends` and `receives`: the other engine's ranks, and the model's heads by KV group that go there or come from
    there. In direct mode that is our own counterpart with all it has, so no heads are named."""

    direct: bool
    sends: dict[Rank, tuple[Heads, ...]] = field(default_factory=dict)
    receives: dict[Rank, tuple[Heads, ...]] = field(default_factory=dict)

    @property
    def ranks(self) -> list[Rank]:
        """Whom to connect to."""
        return sorted(self.sends.keys() | self.receives.keys())


def meeting(own: EngineCard, other: EngineCard, rank: Rank) -> Meeting:
    """For our rank `rank`. The cards have been compared (lmkv.vllm.fingerprint.compare). Raises LayoutError."""
    if is_direct(own, other):
        return Meeting(True, {rank: ()}, {rank: ()})
    ours = [worker.geometries for worker in own.workers]
    theirs = [worker.geometries for worker in other.workers]
    found = Meeting(False)
    if own.role != "decode" and other.role != "prefill":
        found.sends.update({d: heads for (p, d), heads in engine_routes(ours, theirs).items() if p == rank})
    if own.role != "prefill" and other.role != "decode":
        found.receives.update({p: heads for (p, d), heads in engine_routes(theirs, ours).items() if d == rank})
    return found
