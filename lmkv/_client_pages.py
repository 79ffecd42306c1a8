"""KV as tensors, packed into canonical pages and back, with a checksum a head. For `lmkv.client`.

A tensor is [layers, parts, heads, tokens, dim]: parts are K and V, or one latent (MLA, with one head).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lmkv.errors import LayoutError
from lmkv.kernels import Cache, pack_pages
from lmkv.layout import WIDTHS, Geometry, canonical_pages, page_bytes, segments, vllm_cache

Sums = tuple[int, ...]
_MASK = (1 << 64) - 1


class Pages:
    """Pages of `chunk_tokens` of one model. Raises LayoutError for a model that cannot be."""

    def __init__(self, layers: int, parts: int, heads: int, dim: int, dtype: str, chunk_tokens: int) -> None:
        if dtype not in WIDTHS:
            raise LayoutError(f"dtype {dtype!r} is unknown", hint=f"known: {', '.join(WIDTHS)}")
        if min(layers, heads, dim) < 1:
            raise LayoutError(f"a model of {layers} layers, {heads} heads and dimension {dim} cannot be")
        self._shape = (layers, parts, heads, dim)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._chunk_tokens = chunk_tokens
        sizes = vllm_cache(
            "LBHNC",
            layers=layers,
            blocks=1,
            heads=heads,
            block_tokens=chunk_tokens,
            parts=(dim,) * parts,
            dtype=dtype,
        )
        self.geometry: Geometry = canonical_pages(sizes, page_tokens=chunk_tokens)
        self.bytes = page_bytes(self.geometry)
        self.heads = heads
        self._heads = [canonical_pages(sizes, page_tokens=chunk_tokens, heads=(h, h + 1)) for h in range(heads)]

    def check(self, kv: torch.Tensor, tokens: int) -> None:
        """Raises LayoutError for a tensor that is not KV of so many tokens."""
        layers, parts, heads, dim = self._shape
        if tuple(kv.shape) != (layers, parts, heads, tokens, dim) or kv.dtype != self._dtype:
            raise LayoutError(
                f"KV has the shape {list(kv.shape)} and is {kv.dtype}; for {tokens} tokens it is "
                f"{[layers, parts, heads, tokens, dim]} and {self._dtype}",
                hint="[layers, 2, heads, tokens, head_dim], or [layers, 1, 1, tokens, latent] for MLA",
            )

    def empty(self, tokens: int) -> torch.Tensor:
        layers, parts, heads, dim = self._shape
        return torch.empty((layers, parts, heads, tokens, dim), dtype=self._dtype)

    def pack(self, kv: torch.Tensor, chunk: int, page: NDArray[np.uint8]) -> Sums:
        """Chunk number `chunk` of `kv` into a page; its checksums by head."""
        lo = chunk * self._chunk_tokens
        part = kv[:, :, :, lo : lo + self._chunk_tokens].cpu().permute(2, 0, 1, 3, 4).contiguous()
        return self._copy(part.view(torch.uint8).reshape(-1), torch.from_numpy(page))

    def unpack(self, page: NDArray[np.uint8], kv: torch.Tensor, chunk: int) -> Sums:
        """The reverse. Returns the checksums of just those bytes that went into `kv`, whoever changes the page now."""
        own = torch.empty(self.bytes, dtype=torch.uint8)
        own.copy_(torch.from_numpy(page))
        sums = self._copy(own, torch.empty(self.bytes, dtype=torch.uint8))
        layers, parts, heads, dim = self._shape
        lo = chunk * self._chunk_tokens
        rows = own.view(self._dtype).view(heads, layers, parts, self._chunk_tokens, dim)
        kv[:, :, :, lo : lo + self._chunk_tokens].copy_(rows.permute(1, 2, 0, 3, 4))
        return sums

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> Sums:
        """A page into a page, head by head, for the checksums."""
        size, found, one = self.bytes // self.heads, [], np.zeros(1, dtype=np.int64)
        for head, g in enumerate(self._heads):
            table = segments(g, g, one, one, (0, self._chunk_tokens))
            here, there = (Cache.of(data[head * size : (head + 1) * size], g) for data in (source, target))
            found.append(int(pack_pages(here, there, table)[0]) & _MASK)
        return tuple(found)
