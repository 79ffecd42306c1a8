"""What a worker says of itself to peers."""

from __future__ import annotations

import msgspec

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.ids import Rank
from lmkv.process import own_process

from . import memory
from .checking import demanded_ppm
from .checksums import Checksums


def worker_card(
    found: memory.KvMemory, settings: ConnectorSettings, rank: Rank, address: str, export: bytes
) -> wire.WorkerCard:
    """The card of this process's rank: its memory, which checksums it demands and can compute, and who it is."""
    card = found.card(rank, address, settings.transport.split(":")[0], export)
    return msgspec.structs.replace(
        card,
        checked_ppm=demanded_ppm(settings, found),
        checksum=Checksums(found).name,
        process=own_process(),
    )


def times(settings: ConnectorSettings) -> wire.Times:
    """What peers compare with their own."""
    return wire.Times(settings.beat_s, settings.lease_s, settings.hold_s, settings.deadline_s)
