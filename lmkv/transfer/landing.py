"""Landing mode: which bytes a prefill rank puts into a slot, and what decode finds there.

The writer sends its own blocks as they are, or the heads of them that the other rank needs where those lie side by
side: by layer, then block, without gaps. Decode describes the slot by the same rule (`slot_geometry`) and converts from
there. All sizes come from the writer's geometry, which both know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from lmkv.errors import LayoutError, TransferError
from lmkv.layout import Geometry
from lmkv.transport import Extents, MemoryKind, merge_runs

from .events import Rect
from .plan import NULL_BLOCK, KvMap


@dataclass(frozen=True, slots=True)
class Share:
    """What of each kernel block travels: `bytes` from `offset_bytes` on, with heads [first_head, first_head + heads).

    A manager block is `kernel_blocks` kernel blocks, one after the other.
    """

    geometry: Geometry
    first_head: int
    heads: int
    offset_bytes: int
    bytes: int
    kernel_blocks: int

    def rect_bytes(self, rect: Rect) -> int:
        """What a rectangle without null blocks takes in a slot."""
        cells = (rect.layer_hi - rect.layer_lo) * (rect.block_hi - rect.block_lo)
        return cells * self.kernel_blocks * self.bytes


def share_of(source: Geometry, heads: tuple[int, int], block_tokens: int) -> Share:
    """The share of `source` that has the model's heads [lo, hi). `block_tokens`: of a manager block.

    Raises LayoutError for heads that are not there.
    """
    lo, hi = heads[0] - source.first_head, heads[1] - source.first_head
    if not 0 <= lo < hi <= source.heads:
        raise LayoutError(f"heads {heads} are not among {source.heads} from {source.first_head} on")
    kernel_blocks, rest = divmod(block_tokens, source.block_tokens)
    if rest:
        raise LayoutError(f"a block of {block_tokens} tokens is not made of kernel blocks of {source.block_tokens}")
    area = source.block_tokens * source.content
    _, _, head_stride, token_stride = source.strides
    together = source.interior != "plain" or token_stride < head_stride or source.heads == 1
    if not together:  # heads lie within tokens: the whole block travels, decode picks
        lo, hi = 0, source.heads
    size = (hi - lo) * area * source.width
    first = lo * head_stride * source.width if together else 0
    return Share(source, source.first_head + lo, hi - lo, first, size, kernel_blocks)


def slot_geometry(share: Share, rect: Rect) -> Geometry:
    """How the bytes of `rect` lie in their slot."""
    source = share.geometry
    blocks = (rect.block_hi - rect.block_lo) * share.kernel_blocks
    block_elements = share.bytes // source.width
    _, _, head, token = source.strides
    return msgspec.structs.replace(
        source,
        layers=rect.layer_hi - rect.layer_lo,
        blocks=blocks,
        heads=share.heads,
        strides=(block_elements * blocks, block_elements, head, token),
        first_layer=source.first_layer + rect.layer_lo,
        first_head=share.first_head,
        total_layers=source.model_layers,
        total_heads=source.model_heads,
    )


def kernel_ids(block_ids: Sequence[int] | NDArray[np.int64], kernel_blocks: int) -> NDArray[np.int64]:
    """Kernel block ids of manager blocks, in order. -1 for those of null blocks."""
    ids = np.asarray(block_ids, dtype=np.int64)
    expanded = (ids[:, None] * kernel_blocks + np.arange(kernel_blocks)).reshape(-1)
    return np.where(np.repeat(ids == NULL_BLOCK, kernel_blocks), -1, expanded)


def extents_into_slot(
    source: KvMap,
    share: Share,
    rect: Rect,
    block_ids: Sequence[int],
    slot_address: int,
    slot_bytes: int,
    kind: MemoryKind = MemoryKind.DRAM,
    device: int = 0,
) -> tuple[Extents, Extents]:
    """Local and remote extents that put `rect` of these blocks into the slot, in memory of `kind` on `device`.

    Raises TransferError for blocks out of range, null, or more than the slot takes."""
    size = share.rect_bytes(rect)
    if size > slot_bytes:
        raise TransferError(f"{rect} takes {size} bytes, a landing slot has {slot_bytes}")
    ids = np.asarray(block_ids, dtype=np.int64)
    rows = source.rows(rect)
    limit = int(source.num_blocks[rows].min())
    if len(ids) != rect.block_hi - rect.block_lo or ids.min() <= NULL_BLOCK or ids.max() >= limit:
        raise TransferError(f"{rect} needs blocks in [1, {limit}) at the source, got {ids.tolist()[:8]}…")
    kernel_bytes = source.block_bytes[rows] // np.uint64(share.kernel_blocks)
    starts = source.address[rows][:, None] + source.stride[rows][:, None] * ids.astype(np.uint64)[None, :]
    inner = kernel_bytes[:, None, None] * np.arange(share.kernel_blocks, dtype=np.uint64)[None, None, :]
    address = (starts[:, :, None] + inner + np.uint64(share.offset_bytes)).reshape(-1)
    local = np.empty((len(address), 3), dtype=np.uint64)
    local[:, 0], local[:, 1] = address, share.bytes
    local[:, 2] = np.repeat(source.device[rows], len(ids) * share.kernel_blocks)
    remote = np.empty_like(local)
    remote[:, 0] = np.uint64(slot_address) + np.arange(len(address), dtype=np.uint64) * np.uint64(share.bytes)
    remote[:, 1], remote[:, 2] = share.bytes, device
    return merge_runs(Extents(local, source.kind), Extents(remote, kind))
