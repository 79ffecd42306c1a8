"""The KV caches of one rank as numbers: written by a fake forward, compared bit for bit, poisoned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .kinds import DTYPES, SHAPE, EngineKind, layer_names
from .values import States, Values

Bits = NDArray[np.unsignedinteger]

POISON = 255
"""All bits set: no value of the model (a NaN in both dtypes)."""


class RankCaches:
    """`tensors` are what vLLM would register: by layer, [blocks, heads, tokens, content], one storage."""

    def __init__(self, kind: EngineKind, rank: int) -> None:
        heads = SHAPE.heads // kind.ranks
        dtype = DTYPES[kind.dtype]
        self.block_tokens = kind.block_tokens
        self.values = Values(SHAPE, (rank * heads, (rank + 1) * heads))
        size = (SHAPE.layers, kind.blocks, heads, kind.block_tokens, SHAPE.content)
        storage = torch.zeros(size, dtype=dtype)
        self.tensors = {name: storage[i] for i, name in enumerate(layer_names())}
        bits = torch.int16 if dtype is torch.bfloat16 else torch.int32
        self._bits: Bits = storage.view(bits).numpy().view(np.uint16 if bits is torch.int16 else np.uint32)
        self._table: Bits = torch.arange(256).to(dtype).view(bits).numpy().view(self._bits.dtype)
        self._poison = self._bits.dtype.type(np.iinfo(self._bits.dtype).max)
        self.poison(range(kind.blocks))

    def poison(self, block_ids: Sequence[int] | range) -> None:
        self._bits[:, list(block_ids)] = self._poison

    def is_poison(self, block_id: int) -> bool:
        return bool((self._bits[:, block_id] == self._poison).all())

    def write(self, layer: int, block_ids: NDArray[np.int64], lo: int, hi: int, states: States) -> None:
        """KV of tokens [lo, hi), whose states are given from token 0 on, into their blocks."""
        places = np.arange(lo, hi)
        blocks, offsets = block_ids[places // self.block_tokens], places % self.block_tokens
        self._bits[layer][blocks, :, offsets] = self._table[self.values.of(states[lo:hi], layer)]

    def wrong(self, layer: int, block_ids: NDArray[np.int64], lo: int, hi: int, states: States) -> int:
        """The first of tokens [lo, hi) whose KV in this layer isn't right, or -1."""
        found = self._read(layer, block_ids, lo, hi)
        right = (found == self._table[self.values.of(states[lo:hi], layer)]).all(axis=(1, 2))
        return -1 if right.all() else lo + int(np.argmin(right))

    def read(self, layer: int, block_ids: NDArray[np.int64], lo: int, hi: int) -> NDArray[np.uint8]:
        """uint8 [tokens, heads, content]. Values that aren't the model's are cut to a byte."""
        found = self._read(layer, block_ids, lo, hi)
        return (np.searchsorted(self._table, found) & 0xFF).astype(np.uint8)

    def _read(self, layer: int, block_ids: NDArray[np.int64], lo: int, hi: int) -> Bits:
        places = np.arange(lo, hi)
        blocks, offsets = block_ids[places // self.block_tokens], places % self.block_tokens
        found: Bits = self._bits[layer][blocks, :, offsets]
        return found
