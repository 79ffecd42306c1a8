"""Runs a pool node in this process: opens its tiers, announces it, drains on SIGINT or SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from lmkv.poolwire import NodeCard, Tier

from . import faults
from .node import PoolNode
from .settings import NodeSettings
from .tiering import TierSettings


def serve(settings: NodeSettings, environ: Mapping[str, str], announce: Callable[[NodeCard], None]) -> None:
    """Until told to stop. Raises ConfigError, TierError."""
    faults.arm(environ.get(faults.VARIABLE, ""))
    node = PoolNode(settings, lambda evicted: open_tiers(settings, evicted))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: node.stop())
    node.run(lambda: announce(node.card))


def open_tiers(settings: NodeSettings, evicted: Callable[[Tier, list[bytes]], None]) -> list[TierSettings]:
    """Those of the settings, disk first. `evicted`: see `StoreTier`. Raises ConfigError, TierError."""
    found: list[TierSettings] = []
    if not settings.disk and not settings.object:
        return found
    from .tiers.disk import DiskTier  # noqa: PLC0415  (sqlite and obstore are loaded by who needs them)
    from .tiers.objects import ObjectTier  # noqa: PLC0415
    from .tiers.sealing import Sealer  # noqa: PLC0415

    sealer = Sealer.from_file(Path(settings.key_file)) if settings.key_file else None
    if settings.disk:
        disk = DiskTier(
            Path(settings.disk),
            settings.disk_capacity,
            evicted=lambda keys: evicted(Tier.DISK, keys),
            sealer=sealer,
            segment_bytes=settings.disk_segment,
        )
        found.append(TierSettings(disk, settings.disk_admit_hits, settings.queue))
    if settings.object:
        store = ObjectTier(
            settings.object,
            sealer=sealer,
            endpoint=settings.object_endpoint,
            region=settings.object_region,
            allow_http=settings.object_allow_http,
        )
        found.append(TierSettings(store, settings.object_admit_hits, settings.queue))
    return found
