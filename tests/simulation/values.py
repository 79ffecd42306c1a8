"""KV whose every byte can be checked: a function of the tokens before it, and the answers that follow from it.

A prefix of tokens has a 64-bit state, a cumulative sum of hashes of (position, token); the KV of a token is a function
of the state after it, the layer, the head and the place within K or V. All values are whole numbers below 256, which
bfloat16 and float32 hold exactly. A sampled token is a function of the KV that was *read*, so a wrong byte changes the
answer, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

States = NDArray[np.uint64]

VOCABULARY = 997
_ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit hash of each value (the finalizer of a multiply-xorshift generator)."""
    values = (values ^ (values >> _SHIFT)) * _MIX
    values = (values ^ (values >> _SHIFT)) * _MIX
    return values ^ (values >> _SHIFT)


def prefix_states(tokens: Sequence[int], seed: int = 0, first: int = 0, before: int = 0) -> States:
    """State after each token, uint64 [len(tokens)]. `seed` stands for what else KV depends on (an adapter). To go on
    with a sequence, give the number of tokens before and the state after them."""
    ids = np.asarray(tokens, dtype=np.uint64)
    places = np.arange(first, first + len(ids), dtype=np.uint64)
    start = np.uint64((seed + 1) * int(_MIX) & 0xFFFFFFFFFFFFFFFF)
    hashes = mix(ids * _ODD + places + start)
    states: States = np.cumsum(hashes, dtype=np.uint64) + np.uint64(before)
    return states


_ALL = 0xFFFFFFFFFFFFFFFF


def next_state(token: int, seed: int, place: int, before: int) -> int:
    """`prefix_states` of one token at `place`, without numpy's cost of a call."""
    value = (token * int(_ODD) + place + (seed + 1) * int(_MIX)) & _ALL
    for _ in range(2):
        value = (value ^ (value >> 32)) * int(_MIX) & _ALL
    return ((value ^ (value >> 32)) + before) & _ALL


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model its KV cache shows. `content`: elements of K and V of one token and head."""

    layers: int = 2
    heads: int = 2
    content: int = 8


class Values:
    """The KV of one model. `heads` are those of a rank: [lo, hi) of the model's."""

    def __init__(self, shape: ModelShape, heads: tuple[int, int]) -> None:
        lo, hi = heads
        layer = np.arange(shape.layers, dtype=np.uint64)[:, None, None]
        head = np.arange(lo, hi, dtype=np.uint64)[None, :, None]
        place = np.arange(shape.content, dtype=np.uint64)[None, None, :]
        self._keys = mix((layer * np.uint64(1009) + head) * np.uint64(4099) + place + np.uint64(17))

    def keys(self, layer: int) -> NDArray[np.uint64]:
        """[heads, content]: what tells the places of a token in this layer apart."""
        keys: NDArray[np.uint64] = self._keys[layer]
        return keys

    def all_layers(self, states: States) -> NDArray[np.uint8]:
        """uint8 [layers, tokens, heads, content]."""
        return self.cut(states[None, :, None, None] ^ self._keys[:, None])

    @staticmethod
    def cut(values: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """A byte of each, from state XOR key."""
        return ((values * _ODD) >> np.uint64(56)).astype(np.uint8)


def sampled(read: NDArray[np.uint8], salt: int = 0) -> int:
    """The token that follows a sequence, from the KV [tokens, heads, content] that its last layer has read."""
    total = int(read.sum(dtype=np.uint64)) + salt
    return int((total * 2654435761 >> 7) % VOCABULARY)


def answer(shape: ModelShape, prompt: Sequence[int], count: int, heads: int, seed: int = 0) -> list[int]:
    """The `count` tokens that an engine whose KV is right gives; sampled from the last layer of the first `heads`."""
    keys = Values(shape, (0, heads)).keys(shape.layers - 1).reshape(-1)
    states = prefix_states(prompt, seed)
    total = int(Values.cut(states[:, None] ^ keys).sum(dtype=np.uint64))
    state, tokens = int(states[-1]), []
    for place in range(len(prompt), len(prompt) + count):
        token = int((total * 2654435761 >> 7) % VOCABULARY)
        tokens.append(token)
        state = next_state(token, seed, place, state)
        total += int(Values.cut(np.uint64(state) ^ keys).sum(dtype=np.uint64))
    return tokens
