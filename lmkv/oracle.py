"""What every kernel has to compute, in numpy and as plainly as it can be said. Slow; used by tests and self-tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .layout import Array, Geometry, Segments, part_maps, window
from .rope import Rope

Bytes = NDArray[np.uint8]
_MASK = (1 << 64) - 1
WORD_KEY = 0x9E3779B97F4A7C15
WORD_PRIME = 0x9E3779B1


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A cache in host memory: its bytes, and where in them each layer begins (bytes)."""

    data: Bytes
    layers: Array
    geometry: Geometry

    @classmethod
    def of(cls, data: Bytes, geometry: Geometry) -> Place:
        return cls(data, geometry.layer_offsets_bytes(), geometry)


def element_bytes(place: Place, layer: int, part: int, head: int, blocks: Array, tokens: Array) -> Array:
    """(len(tokens), D): the byte offset of every number of one layer, part and head at (blocks[i], tokens[i])."""
    g = place.geometry
    dims = np.arange(g.parts[part], dtype=np.int64)
    elements = part_maps(g)[part].element(blocks[:, None], np.full((1, 1), head), tokens[:, None], dims[None, :])
    return np.asarray(place.layers[layer] + elements * g.width)


def _tokens(segments: Segments) -> tuple[Array, Array, Array, Array]:
    """Source block, source token, target block, target token of every single token."""
    table = segments.astype(np.int64)
    counts = table[:, 4]
    within = np.arange(counts.sum(), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    return (
        np.repeat(table[:, 0], counts),
        np.repeat(table[:, 1], counts) + within,
        np.repeat(table[:, 2], counts),
        np.repeat(table[:, 3], counts) + within,
    )


def convert(source: Place, target: Place, segments: Segments) -> None:
    """Copy the heads and layers that both places share, token by token, into `target.data`."""
    w = window(source.geometry, target.geometry)
    sb, sn, tb, tn = _tokens(segments)
    for layer in range(w.layers):
        for part in range(len(source.geometry.parts)):
            for head in range(w.heads):
                at_s = element_bytes(source, w.source_layer + layer, part, w.source_head + head, sb, sn)
                at_t = element_bytes(target, w.target_layer + layer, part, w.target_head + head, tb, tn)
                raw = source.data[at_s[..., None] + np.arange(source.geometry.width)]
                out = cast(raw, source.geometry.dtype, target.geometry.dtype)
                target.data[at_t[..., None] + np.arange(target.geometry.width)] = out


def page_sums(page: Place, segments: Segments, *, pages_are_source: bool = False) -> NDArray[np.uint64]:
    """(pages,): the checksum of the rows that the segments touch, by page. See csrc/include/lmkv/checksum.h."""
    g = page.geometry
    sb, sn, tb, tn = _tokens(segments)
    blocks, tokens = (sb, sn) if pages_are_source else (tb, tn)
    words = row_words(g)
    sums = np.zeros(g.blocks, dtype=np.uint64)
    for layer in range(g.layers):
        for part in range(len(g.parts)):
            for head in range(g.heads):
                at = element_bytes(page, layer, part, head, blocks, tokens)
                rows = page.data[at[..., None] + np.arange(g.width)].reshape(len(blocks), -1)
                padded = np.zeros((len(blocks), words * 8), dtype=np.uint8)
                padded[:, : rows.shape[1]] = rows
                row = ((g.first_head + head) * g.model_layers + g.first_layer + layer) * len(g.parts) + part
                index = ((row * g.block_tokens + tokens) * words)[:, None] + np.arange(words)
                used = -(-rows.shape[1] // 8)
                mixed = mix(padded.view("<u8"), index.astype(np.uint64))[:, :used]
                np.add.at(sums, blocks, mixed.sum(axis=1, dtype=np.uint64))
    return sums


def runs_sum(data: Bytes, runs: NDArray[np.int64], first: int = 0) -> int:
    """The checksum of the runs (offset, bytes) of `data`, one after the other, filled up with zeros to words. Word i
    has the index first + i. See csrc/include/lmkv/runs.h."""
    stream = np.concatenate([np.zeros(0, dtype=np.uint8), *(data[at : at + size] for at, size in runs.tolist())])
    words = np.pad(stream, (0, -len(stream) % 8)).view("<u8")
    index = np.arange(len(words), dtype=np.uint64) + np.uint64(first)
    return int(mix(words, index).sum(dtype=np.uint64))


def row_words(g: Geometry) -> int:
    """8-byte words of the longest part's row."""
    return -(-max(g.parts) * g.width // 8)


def mix(word: NDArray[np.uint64], index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = word ^ ((index + np.uint64(1)) * np.uint64(WORD_KEY))
        x = x ^ (x >> np.uint64(32))
        x = x * np.uint64(WORD_PRIME)
        return np.asarray(x ^ (x >> np.uint64(32)))


def rotate(place: Place, runs: NDArray[np.int32], offsets: Array, rope: Rope) -> None:
    """Turn the keys of each run (block, token, tokens) by its offset, in place; those with offset 0 are left alone."""
    g, lanes = place.geometry, np.arange(place.geometry.width)
    for (block, token, count), offset in zip(runs.astype(np.int64), offsets, strict=True):
        if offset == 0:
            continue
        cosines, sines = rope.turns([offset])[0]
        tokens = token + np.arange(count)
        for layer in range(g.layers):
            for head in range(g.heads):
                at = element_bytes(place, layer, 0, head, np.full(count, block), tokens)
                a, b = (at[:, dims, None] + lanes for dims in rope.dims())
                x, y = to_float(place.data[a], g.dtype), to_float(place.data[b], g.dtype)
                with np.errstate(invalid="ignore", over="ignore"):
                    place.data[a] = from_float(one_nan(x * cosines - y * sines), g.dtype)
                    place.data[b] = from_float(one_nan(y * cosines + x * sines), g.dtype)


def one_nan(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """Machines differ in the bits of the NaNs that arithmetic makes: all of them become this one."""
    return np.asarray(np.where(np.isnan(value), np.float32(np.nan), value), dtype=np.float32)


def cast(raw: Bytes, source: str, target: str) -> Bytes:
    """(..., source width) bytes to (..., target width), rounded to nearest even."""
    return raw if source == target else from_float(to_float(raw, source), target)


def to_float(raw: Bytes, dtype: str) -> NDArray[np.float32]:
    """Exact; NaNs keep their bits. (What numpy makes of them depends on the processor.)"""
    raw = np.ascontiguousarray(raw)
    if dtype == "bfloat16":
        bits = raw.view("<u2")[..., 0].astype(np.uint32) << 16
        return bits.view(np.float32)
    if dtype == "float32":
        return np.asarray(raw.view("<f4")[..., 0])
    half = raw.view("<u2")[..., 0].astype(np.uint32)
    nan = (half & 0x8000) << 16 | 0x7F800000 | (half & 0x3FF) << 13
    values = raw.view("<f2")[..., 0]
    return np.where(np.isnan(values), nan, values.astype(np.float32).view(np.uint32)).view(np.float32)


def from_float(value: NDArray[np.float32], dtype: str) -> Bytes:
    """Rounded to nearest even; NaNs become quiet where they lose bits, and keep sign and upper bits."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    if dtype == "bfloat16":
        rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        out = np.where(np.isnan(value), bits >> 16 | 0x40, rounded).astype("<u2")
    elif dtype == "float16":
        nan = (bits >> 16 & 0x8000) | 0x7E00 | (bits >> 13 & 0x3FF)
        with np.errstate(over="ignore"):
            rounded = value.astype("<f2").view("<u2")
        out = np.where(np.isnan(value), nan, rounded).astype("<u2")
    else:
        out = bits.astype("<u4")
    return out[..., None].view(np.uint8)
