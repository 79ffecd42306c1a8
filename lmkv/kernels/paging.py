"""One rank's share of canonical pages: its caches' blocks packed into pages, and unpacked from them, with checksums.

A page of the pool holds a chunk of tokens for all heads of the model; a rank has a contiguous range of the heads, which
is a contiguous range of the page's bytes (docs/page-format.md). The checksums of a page are one a head, so that a rank
with other heads than the writer's can check just what it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from lmkv.errors import LayoutError
from lmkv.layout import Array, Geometry, canonical_pages, page_bytes, segments

from ._guard import kernel_errors
from .cache import Cache
from .ops import convert_blocks, pack_pages, unpack_pages

Sums = tuple[int, ...]
"""Of one page: by head, as unsigned 64-bit integers."""


@dataclass(frozen=True, slots=True)
class Run:
    """Pages that lie `stride` bytes apart from `offset` on and hold consecutive chunks from `chunk` on."""

    index: int
    chunk: int
    offset: int
    stride: int
    count: int


def runs(chunks: Sequence[int], offsets: Sequence[int]) -> Iterator[Run]:
    """As few runs as there are. Entry i: chunk `chunks[i]` lies at `offsets[i]`."""
    start = 0
    while start < len(chunks):
        stop, stride = start + 1, 0
        while stop < len(chunks) and chunks[stop] == chunks[stop - 1] + 1:
            step = offsets[stop] - offsets[stop - 1]
            if step <= 0 or (stride and step != stride):
                break
            stride, stop = step, stop + 1
        yield Run(start, chunks[start], offsets[start], stride, stop - start)
        start = stop


class PageShare:
    """`caches` is the geometry of this rank's caches of one KV group, `chunk_tokens` the tokens of a page."""

    def __init__(self, caches: Geometry, chunk_tokens: int) -> None:
        self.caches = caches
        self.chunk_tokens = chunk_tokens
        heads = (caches.first_head, caches.first_head + caches.heads)
        whole = canonical_pages(caches, page_tokens=chunk_tokens)
        if caches.layers != caches.model_layers:
            raise LayoutError(f"{caches.layers} of {caches.model_layers} layers are here; pages need them all")
        self.whole = whole
        self.page_bytes = page_bytes(whole)
        self._head_bytes = self.page_bytes // whole.heads
        self.offset_bytes = heads[0] * self._head_bytes
        """Of our share in a page."""
        self.bytes = caches.heads * self._head_bytes
        self.shards = -(-whole.heads // caches.heads)
        self.shard = heads[0] // caches.heads
        if heads[0] % caches.heads or whole.heads % caches.heads:
            raise LayoutError(f"heads {heads} of {whole.heads} are no even share; such engines cannot use the pool")
        self._pages = [canonical_pages(caches, page_tokens=chunk_tokens, heads=(h, h + 1)) for h in range(*heads)]

    def own_sums(self, sums: Sums) -> Sums:
        """Those of our heads among a page's."""
        return sums[self.caches.first_head : self.caches.first_head + self.caches.heads]

    @kernel_errors("packing pages")
    def pack(
        self,
        source: Cache,
        blocks: Array,
        first_token: int,
        chunks: Sequence[int],
        data: torch.Tensor,
        offsets: Sequence[int],
    ) -> list[Sums]:
        """Chunk `chunks[i]` into our share of a page at `data[offsets[i]:]`; returns each one's checksums.

        `blocks`: the kernel blocks of `source` that hold the tokens from `first_token` on.
        """
        found: list[list[int]] = [[] for _ in chunks]
        for run in runs(chunks, offsets):
            tokens = self._tokens(run)
            ids = np.arange(run.count)
            # The same for every head: cuts depend on the sizes of blocks only.
            table = segments(
                source.geometry, self.whole, blocks, ids, tokens, source_first=first_token, target_first=tokens[0]
            )
            for head in range(self.caches.heads):
                pages = self._cache(data, run, head)
                for i, value in enumerate(_unsigned(pack_pages(source, pages, table))):
                    found[run.index + i].append(value)
        return [tuple(sums) for sums in found]

    @kernel_errors("unpacking pages")
    def unpack(
        self,
        data: torch.Tensor,
        offsets: Sequence[int],
        chunks: Sequence[int],
        target: Cache,
        blocks: Array,
        first_token: int,
        from_token: int = 0,
    ) -> list[Sums]:
        """The reverse; returns the checksums of what was read. Tokens before `from_token` are not written: of a page
        that has some, it is read whole into memory of its own first, so that its checksums can be told."""
        found: list[list[int]] = [[] for _ in chunks]
        for run in runs(chunks, offsets):
            if run.chunk * self.chunk_tokens < from_token:
                self._unpack_cut(data, run, target, blocks, first_token, from_token, found)
                continue
            tokens = self._tokens(run)
            ids = np.arange(run.count)
            table = segments(
                self.whole, target.geometry, ids, blocks, tokens, source_first=tokens[0], target_first=first_token
            )
            for head in range(self.caches.heads):
                pages = self._cache(data, run, head)
                for i, value in enumerate(_unsigned(unpack_pages(pages, target, table))):
                    found[run.index + i].append(value)
        return [tuple(sums) for sums in found]

    def _unpack_cut(
        self,
        data: torch.Tensor,
        run: Run,
        target: Cache,
        blocks: Array,
        first_token: int,
        from_token: int,
        found: list[list[int]],
    ) -> None:
        whole = msgspec.structs.replace(self._share(), blocks=run.count)
        copy = Cache.empty(whole, data.device)
        tokens = self._tokens(run)
        ids = np.arange(run.count)
        table = segments(whole, whole, ids, ids, tokens, source_first=tokens[0], target_first=tokens[0])
        for head in range(self.caches.heads):
            pages = self._cache(data, run, head)
            for i, value in enumerate(_unsigned(unpack_pages(pages, copy, table))):
                found[run.index + i].append(value)
        wanted = (max(tokens[0], from_token), tokens[1])
        if wanted[0] < wanted[1]:
            table = segments(
                whole,
                target.geometry,
                np.arange(run.count),
                blocks,
                wanted,
                source_first=tokens[0],
                target_first=first_token,
            )
            convert_blocks(copy, target, table)

    def _share(self) -> Geometry:
        """A page with our heads alone."""
        heads = (self.caches.first_head, self.caches.first_head + self.caches.heads)
        return canonical_pages(self.caches, page_tokens=self.chunk_tokens, heads=heads)

    def _tokens(self, run: Run) -> tuple[int, int]:
        return run.chunk * self.chunk_tokens, (run.chunk + run.count) * self.chunk_tokens

    def _cache(self, data: torch.Tensor, run: Run, head: int) -> Cache:
        """Our head number `head` in the pages of a run."""
        page, width = self._pages[head], self.caches.width
        first = run.offset + head * self._head_bytes
        stride = run.stride or self._head_bytes
        layer, _, head_stride, token = page.strides
        geometry = msgspec.structs.replace(page, blocks=run.count, strides=(layer, stride // width, head_stride, token))
        return Cache.of(data[first : first + stride * (run.count - 1) + self._head_bytes], geometry)


def _unsigned(sums: torch.Tensor) -> list[int]:
    return [value & 0xFFFF_FFFF_FFFF_FFFF for value in sums.tolist()]
