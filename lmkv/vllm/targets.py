"""Where a write of prefill goes: from our blocks into a peer's blocks, or into one of its landing slots."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from lmkv import wire
from lmkv.transfer import events as ev
from lmkv.transfer.landing import Share, extents_into_slot, share_of
from lmkv.transfer.plan import KvMap, extents_for
from lmkv.transport import Extents, MemoryKind, PeerId

from . import memory
from .pal import Pal

_REMEMBERED = 256
"""The newest connections' layers and shares; those of others are made again from their cards."""


class Targets:
    """Remembers each peer's layers and shares by connection. Loop thread only."""

    def __init__(self, found: memory.KvMemory, own: KvMap) -> None:
        self._found = found
        self._map = own
        self._peer_maps: OrderedDict[PeerId, KvMap] = OrderedDict()
        self._shares: OrderedDict[tuple[PeerId, int], Share] = OrderedDict()

    def extents(self, pal: Pal, rect: ev.Rect, ids: list[int], grant: wire.Grant, slot: int) -> tuple[Extents, Extents]:
        """Local and remote extents of `rect`, which lies in our blocks `ids`. Raises TransferError."""
        return self._into_slot(pal, rect, ids, slot) if slot >= 0 else self._into_blocks(pal, rect, ids, grant)

    def _into_blocks(self, pal: Pal, rect: ev.Rect, ids: list[int], grant: wire.Grant) -> tuple[Extents, Extents]:
        target = self._peer_maps.get(pal.transport_id)
        if target is None:
            target = self._peer_maps[pal.transport_id] = KvMap.from_card(pal.worker)
            _bound(self._peer_maps)
        first = grant.first_block[rect.group]
        target_ids = grant.block_ids[rect.group][rect.block_lo - first : rect.block_hi - first]
        return extents_for(self._map, target, rect, ids, target_ids)

    def _into_slot(self, pal: Pal, rect: ev.Rect, ids: list[int], slot: int) -> tuple[Extents, Extents]:
        key = (pal.transport_id, rect.group)
        share = self._shares.get(key)
        if share is None:
            heads = pal.engine.meeting.sends[pal.peer.rank][rect.group]
            tokens = self._found.block_tokens[rect.group]
            share = self._shares[key] = share_of(self._found.geometries[rect.group], heads, tokens)
            _bound(self._shares)
        worker = pal.worker
        address = worker.slots_address + slot * worker.slot_bytes
        kind, device = MemoryKind(worker.kind), worker.layers[0].device
        return extents_into_slot(self._map, share, rect, ids, address, worker.slot_bytes, kind, device)


def _bound(remembered: OrderedDict[Any, Any]) -> None:
    while len(remembered) > _REMEMBERED:
        remembered.popitem(last=False)
