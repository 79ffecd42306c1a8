"""How often the worker loop polls a data plane that has no descriptors."""

from __future__ import annotations

PACE_S = 0.00005
BUSY_S = 0.001
SLOW_S = 0.008
IDLE_S = 0.05
LONG_S = 0.005
"""A rank that only sends and has seen no write end for so long has a slow link. To look every millisecond would then
push a few packets at a time, and cost the engine on the same core a tenth of its speed."""


def pause_s(*, hurries: bool, awaits: bool, in_flight: int, since_s: float) -> float:
    """Seconds between two polls. `hurries`: pages are being loaded; `awaits`: something of ours is to come;
    `in_flight`: operations of ours, the last of which has ended `since_s` seconds ago."""
    if hurries:
        return PACE_S
    if awaits:
        return BUSY_S
    if in_flight == 0:
        return IDLE_S
    return BUSY_S if since_s < LONG_S else SLOW_S
