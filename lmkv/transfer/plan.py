"""From rectangles to memory: which bytes of which rank go where. Vectorised; no loop over blocks.

The order is always layer, then block; blocks that are null (id 0) at the target do not exist on either side. Merging
joins neighbours and never changes the order of bytes, so both ends hash the same stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmkv.errors import TransferError
from lmkv.transport import Extents, MemoryKind, merge_runs
from lmkv.wire import WorkerCard

from .events import Rect

Ids = NDArray[np.int64]
NULL_BLOCK = 0


@dataclass(frozen=True, slots=True, eq=False)
class KvMap:
    """Where the layers of one worker lie. Row i of every array is layer i in model order.

    `layers_of[g]` are the rows of group g: layer k of a Rect of group g is row `layers_of[g][k]`.
    """

    address: NDArray[np.uint64]
    block_bytes: NDArray[np.uint64]
    stride: NDArray[np.uint64]
    num_blocks: Ids
    group: Ids
    device: NDArray[np.uint64]
    layers_of: tuple[Ids, ...]
    kind: MemoryKind = MemoryKind.DRAM

    @classmethod
    def from_card(cls, card: WorkerCard) -> KvMap:
        layers = card.layers
        group = np.array([layer.group for layer in layers], dtype=np.int64)
        groups = int(group.max()) + 1 if len(group) else 0
        return cls(
            address=np.array([layer.address for layer in layers], dtype=np.uint64),
            block_bytes=np.array([layer.block_bytes for layer in layers], dtype=np.uint64),
            stride=np.array([layer.block_stride_bytes for layer in layers], dtype=np.uint64),
            num_blocks=np.array([layer.num_blocks for layer in layers], dtype=np.int64),
            group=group,
            device=np.array([layer.device for layer in layers], dtype=np.uint64),
            layers_of=tuple(np.flatnonzero(group == g) for g in range(groups)),
            kind=MemoryKind(card.kind),
        )

    def layer_block_bytes(self) -> tuple[int, ...]:
        """Bytes of one block of one layer by group. Raises TransferError when the layers of a group differ."""
        out = []
        for g, rows in enumerate(self.layers_of):
            sizes = np.unique(self.block_bytes[rows])
            if len(sizes) > 1:
                raise TransferError(f"layers of group {g} have blocks of {sizes.tolist()} bytes; they must be equal")
            out.append(int(sizes[0]) if len(sizes) else 1)
        return tuple(out)

    def layers(self) -> tuple[int, ...]:
        """Layers by group."""
        return tuple(len(rows) for rows in self.layers_of)

    def rows(self, rect: Rect) -> Ids:
        """The rows of the rect's layers. Raises TransferError when it names layers that are not here."""
        count = len(self.layers_of[rect.group]) if 0 <= rect.group < len(self.layers_of) else 0
        if not 0 <= rect.layer_lo < rect.layer_hi <= count:
            raise TransferError(
                f"layers [{rect.layer_lo}, {rect.layer_hi}) of group {rect.group} are not among its {count} layers"
            )
        return self.layers_of[rect.group][rect.layer_lo : rect.layer_hi]


def extents_for(
    source: KvMap,
    target: KvMap,
    rect: Rect,
    source_block_ids: Sequence[int] | Ids,
    target_block_ids: Sequence[int] | Ids,
) -> tuple[Extents, Extents]:
    """Extents of `rect` at the source and at the target, row by row equal in bytes, merged.

    The ids are those of the rect's blocks: entry i is block `rect.block_lo + i`. Both are empty when every block is
    null at the target. Raises TransferError: ids out of range, null at the source only, blocks of different size.
    """
    s_rows, t_rows = source.rows(rect), target.rows(rect)
    s_ids, t_ids = _ids(rect, source_block_ids, "source"), _ids(rect, target_block_ids, "target")
    sizes_s, sizes_t = source.block_bytes[s_rows], target.block_bytes[t_rows]
    if not np.array_equal(sizes_s, sizes_t):
        k = int(np.argmax(sizes_s != sizes_t))
        raise TransferError(
            f"layer {rect.layer_lo + k} of group {rect.group} has blocks of {sizes_s[k]} bytes here and {sizes_t[k]} "
            "at the target; direct mode needs equal ones"
        )
    keep = t_ids != NULL_BLOCK
    if bool(np.any(s_ids[keep] == NULL_BLOCK)):
        at = int(np.flatnonzero(keep & (s_ids == NULL_BLOCK))[0])
        raise TransferError(
            f"block {rect.block_lo + at} of group {rect.group} is null at the source, {t_ids[at]} at the target"
        )
    local = Extents(_table(source, rect, s_rows, s_ids[keep], "source"), source.kind)
    remote = Extents(_table(target, rect, t_rows, t_ids[keep], "target"), target.kind)
    return merge_runs(local, remote) if len(local) else (local, remote)


def runs_for(
    own: KvMap, rect: Rect, own_block_ids: Sequence[int] | Ids, target_block_ids: Sequence[int] | Ids | None = None
) -> NDArray[np.uint64]:
    """The rect's bytes on this side as a table (n, 2) of address and bytes, in the order of the checksum.

    `target_block_ids` says which blocks are null; without it `own_block_ids` are the target's (the decode side).
    """
    rows, ids = own.rows(rect), _ids(rect, own_block_ids, "own")
    target = ids if target_block_ids is None else _ids(rect, target_block_ids, "target")
    table = _table(own, rect, rows, ids[target != NULL_BLOCK], "own")
    if len(table):
        extents = Extents(table, own.kind)
        table = merge_runs(extents, extents)[0].table
    return np.ascontiguousarray(table[:, :2])


def _ids(rect: Rect, block_ids: Sequence[int] | Ids, side: str) -> Ids:
    ids = np.asarray(block_ids, dtype=np.int64)
    if ids.shape != (rect.block_hi - rect.block_lo,):
        raise TransferError(f"{rect} needs {rect.block_hi - rect.block_lo} {side} block ids, got shape {ids.shape}")
    return ids


def _table(own: KvMap, rect: Rect, rows: Ids, ids: Ids, side: str) -> NDArray[np.uint64]:
    """Rows (address, bytes, device) for every layer of `rows` × every block of `ids`."""
    if len(ids):
        limit = int(own.num_blocks[rows].min())
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= limit:
            bad = lowest if lowest < 0 else highest
            raise TransferError(f"{side} block id {bad} of {rect} is not in [0, {limit})")
    shape = (len(rows), len(ids))
    table = np.empty((*shape, 3), dtype=np.uint64)
    table[:, :, 0] = own.address[rows][:, None] + own.stride[rows][:, None] * ids.astype(np.uint64)[None, :]
    table[:, :, 1] = own.block_bytes[rows][:, None]
    table[:, :, 2] = own.device[rows][:, None]
    return table.reshape(-1, 3)
