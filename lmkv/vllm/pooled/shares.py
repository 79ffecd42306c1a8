"""This rank's caches as the pool sees them: blocks packed into pages and unpacked, by transfer group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lmkv.hashing import group_shape
from lmkv.kernels import Cache
from lmkv.kernels.paging import PageShare, Sums
from lmkv.layout import Geometry
from lmkv.transfer.landing import kernel_ids

from ..memory import KvMemory
from ..specs import BlockRange


class Shares:
    """Raises LayoutError for caches that have no pages (layers or heads that are no even share)."""

    def __init__(self, found: KvMemory, chunk_tokens: int, rank: int, ranks: int) -> None:
        self._found = found
        self.chunk_tokens = chunk_tokens
        self.groups = [PageShare(geometry, chunk_tokens) for geometry in found.geometries]
        # Of neighbours that hold the same heads, the first stores them.
        self.stores = rank % max(1, ranks // self.groups[0].shards) == 0
        self._sources = [
            Cache.of(storage, geometry, found.layer_offsets(group))
            for group, (storage, geometry) in enumerate(zip(found.storages, found.geometries, strict=True))
        ]

    @property
    def largest_bytes(self) -> int:
        return max(share.bytes for share in self.groups)

    def pack(
        self, group: int, blocks: BlockRange, chunks: Sequence[int], data: torch.Tensor, offsets: Sequence[int]
    ) -> list[Sums]:
        """Offsets are those of our shares in `data`."""
        return self.groups[group].pack(
            self._sources[group],
            self._kernel_blocks(group, blocks),
            self._first_token(group, blocks),
            chunks,
            data,
            offsets,
        )

    def unpack(
        self,
        group: int,
        blocks: BlockRange,
        chunks: Sequence[int],
        data: torch.Tensor,
        offsets: Sequence[int],
        from_token: int,
    ) -> list[Sums]:
        """The reverse; the blocks have been written when it returns."""
        sums = self.groups[group].unpack(
            data,
            offsets,
            chunks,
            self._sources[group],
            self._kernel_blocks(group, blocks),
            self._first_token(group, blocks),
            from_token,
        )
        self._found.device.wait()  # not all that was enqueued comes before the checksums
        return sums

    def _kernel_blocks(self, group: int, blocks: BlockRange) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        geometry: Geometry = self._found.geometries[group]
        return np.asarray(kernel_ids(blocks.ids, self._found.block_tokens[group] // geometry.block_tokens))

    def _first_token(self, group: int, blocks: BlockRange) -> int:
        return blocks.lo * self._found.block_tokens[group]


def shapes(geometries: Sequence[Geometry], chunk_tokens: int) -> tuple[str, ...]:
    """Of the pages of these groups, for the manifest."""
    return tuple(group_shape(PageShare(geometry, chunk_tokens).whole) for geometry in geometries)
