"""The KV caches of one rank as numbers: written by a fake forward, compared bit for bit, poisoned."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from .kinds import DTYPES, SHAPE, EngineKind, layer_names
from .steps import Sequence
from .values import Values

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
        self._low_bits = 8 * self._bits.dtype.itemsize - 16
        # Numbers below 256 are told by the upper 16 bits in either dtype.
        upper = np.arange(1 << 16, dtype=np.uint32) << self._low_bits
        self._numbers = (np.searchsorted(self._table, upper.astype(self._bits.dtype)) & 0xFF).astype(np.uint8)
        self._poison = self._bits.dtype.type(np.iinfo(self._bits.dtype).max)
        self.poison(range(kind.blocks))

    def poison(self, block_ids: Iterable[int]) -> None:
        self._bits[:, list(block_ids)] = self._poison

    def is_poison(self, block_id: int) -> bool:
        return bool((self._bits[:, block_id] == self._poison).all())

    def write(self, layer: int, block_ids: NDArray[np.int64], lo: int, hi: int, sequence: Sequence) -> None:
        """KV of tokens [lo, hi) of a sequence into its blocks."""
        image, bits, n = self._image(sequence).layer(layer, hi), self._bits[layer], self.block_tokens
        first, last = -(-lo // n), hi // n
        if first < last:
            bits[block_ids[first:last]] = image[first:last]
        for block, a, b in _parts(lo, hi, n):
            bits[block_ids[block], :, a:b] = image[block, :, a:b]

    def wrong(self, layer: int, block_ids: NDArray[np.int64], lo: int, hi: int, sequence: Sequence) -> int:
        """The first of tokens [lo, hi) whose KV in this layer isn't right, or -1."""
        image, bits, n = self._image(sequence).layer(layer, hi), self._bits[layer], self.block_tokens
        first, last = -(-lo // n), hi // n
        if first >= last or np.array_equal(bits[block_ids[first:last]], image[first:last]):
            parts = _parts(lo, hi, n)
            if all(np.array_equal(bits[block_ids[block], :, a:b], image[block, :, a:b]) for block, a, b in parts):
                return -1
        for token in range(lo, hi):
            block, offset = divmod(token, n)
            if not np.array_equal(bits[block_ids[block], :, offset], image[block, :, offset]):
                return token
        raise AssertionError("blocks differ, but no token does")

    def read(self, layer: int, block_ids: NDArray[np.int64], hi: int) -> NDArray[np.uint8]:
        """uint8 [tokens, heads, content] of tokens [0, hi). Others than the model's become some byte."""
        blocks = block_ids[: -(-hi // self.block_tokens)]
        found = self._numbers[self._bits[layer][blocks] >> self._low_bits].transpose(0, 2, 1, 3)
        return found.reshape(-1, *found.shape[2:])[:hi]

    def _image(self, sequence: Sequence) -> _Image:
        image: _Image | None = sequence.images.get(self)
        if image is None:
            image = sequence.images[self] = _Image(self.values, self._table, self.block_tokens, sequence)
        return image


class _Image:
    """What a rank's caches have to hold for a sequence: bits [layers, blocks, heads, block_tokens, content]."""

    def __init__(self, values: Values, table: Bits, block_tokens: int, sequence: Sequence) -> None:
        self._values, self._table, self._block_tokens, self._sequence = values, table, block_tokens, sequence
        self._known = 0
        """Tokens."""
        self._bits: Bits | None = None

    def layer(self, layer: int, tokens: int) -> Bits:
        """The blocks [blocks, heads, block_tokens, content] in which the first `tokens` tokens are right."""
        if self._known < tokens:
            self._grow()
        assert self._bits is not None
        found: Bits = self._bits[layer]
        return found

    def _grow(self) -> None:
        states, n = self._sequence.states, self._block_tokens
        whole = self._known // n
        fresh = self._table[self._values.all_layers(states[whole * n :])]
        layers, count, heads, content = fresh.shape
        blocks = -(-count // n)
        held = 0 if self._bits is None else self._bits.shape[1]
        if self._bits is None or whole + blocks > held:
            grown = np.zeros((layers, whole + blocks + 2, heads, n, content), self._table.dtype)
            if self._bits is not None:
                grown[:, :held] = self._bits
            self._bits = grown
        into = self._bits[:, whole : whole + blocks].transpose(0, 1, 3, 2, 4)
        full = count // n
        into[:, :full] = fresh[:, : full * n].reshape(layers, full, n, heads, content)
        if count % n:
            into[:, full, : count % n] = fresh[:, full * n :]
        self._known = len(states)


def _parts(lo: int, hi: int, n: int) -> list[tuple[int, int, int]]:
    """The blocks of n tokens of which [lo, hi) covers a part: (block, first place, end)."""
    first, last = lo // n, (hi - 1) // n
    if first == last:
        return [(first, lo - first * n, hi - first * n)] if hi - lo < n else []
    head = [(first, lo - first * n, n)] if lo % n else []
    return head + ([(last, 0, hi - last * n)] if hi % n else [])
