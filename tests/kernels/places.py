"""Random geometries, caches over them with guard bytes around, and what the oracle makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from hypothesis import strategies as st

from lmkv import layout, oracle
from lmkv.kernels import Cache
from lmkv.layout import Geometry, Segments, canonical_pages, vllm_cache

HEAD_OUTSIDE = ("LBHNC", "BLHNC")
"""Orders in which a block has one head after the other, as packed interiors need."""
GUARD_BYTES = 64


class Shift(NamedTuple):
    """Bytes by which memory misses an alignment of 16: where it begins, and where its layers do in it."""

    base: int = 0
    layers: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two shares of one model, and which tokens go from where to where."""

    source: Geometry
    target: Geometry
    segments: Segments
    shifts: tuple[Shift, Shift] = (Shift(), Shift())

    @property
    def converts(self) -> bool:
        return self.source.dtype != self.target.dtype


QUIET_BIT = {
    "float16": (np.uint16, 0x7C00, 0x0200),
    "bfloat16": (np.uint16, 0x7F80, 0x0040),
    "float32": (np.uint32, 0x7F800000, 0x00400000),
}
"""By type: its bits' type, exponent of infinity, highest bit of the mantissa."""


def empty(g: Geometry, shift: Shift) -> oracle.Place:
    """Memory of the geometry with guards around."""
    data = _bytes(g.span_bytes() + shift.layers + 2 * GUARD_BYTES, shift.base)
    data[:] = 0xA5
    return oracle.Place(data, GUARD_BYTES + shift.layers + g.layer_offsets_bytes(), g)


def random(g: Geometry, shift: Shift, seed: int, *, quiet: bool = False) -> oracle.Place:
    """Likewise, of random bytes. `quiet`: without signalling NaNs: what a conversion makes of their bits is up to
    the machine."""
    p = empty(g, shift)
    p.data[:] = np.random.default_rng(seed).integers(0, 256, len(p.data), dtype=np.uint8)
    if quiet and g.dtype in QUIET_BIT:
        kind, infinity, highest = QUIET_BIT[g.dtype]
        first = int(p.layers[0]) % g.width
        bits = p.data[first : first + (len(p.data) - first) // g.width * g.width].view(kind)
        bits[(bits & (np.iinfo(kind).max >> 1)) > infinity] |= highest
    return p


def cache(p: oracle.Place, device: str = "cpu") -> Cache:
    """On the CPU it shares the place's memory."""
    return Cache.of(torch.from_numpy(p.data).to(device), p.geometry, p.layers)


def copy(p: oracle.Place) -> oracle.Place:
    """Another place with the same bytes."""
    return oracle.Place(p.data.copy(), p.layers, p.geometry)


def _bytes(size: int, base: int) -> oracle.Bytes:
    """New memory that begins `base` bytes past a multiple of 16."""
    raw = np.empty(size + 31, dtype=np.uint8)
    first = -raw.ctypes.data % 16 + base
    return raw[first : first + size]


def has_rows(g: Geometry) -> bool:
    """Whether the dimensions of every token lie side by side."""
    return g.interior in ("plain", "split")


@st.composite
def shares(draw: st.DrawFn, size: int) -> tuple[int, int]:
    """(first, count) of a share that has item 0, or all of them from some item on, so that shares can overlap."""
    first = draw(st.integers(0, size - 1))
    return first, draw(st.integers(1, size - first))


@st.composite
def caches(draw: st.DrawFn, *, parts: tuple[int, ...], heads: int, layers: int, dtype: str, tokens: int) -> Geometry:
    """A share of the model in any order and interior that can be."""
    interiors = ["plain", "plain", "split"]
    if len(parts) == 2 and parts[0] == parts[1]:
        interiors += ["vec", "vec16"]
        if parts[0] % 16 == 0 and layout.WIDTHS[dtype] == 2:
            interiors += ["amx", "amx"]
    interior = draw(st.sampled_from(interiors))
    sixteens = interior == "amx"
    block_tokens = draw(st.sampled_from((16, 32, 48) if sixteens else (1, 2, 3, 4, 5, 8, 16, 17, 32, 64)))
    first_head, own_heads = draw(shares(heads))
    first_layer, own_layers = draw(shares(layers))
    order = draw(st.sampled_from(layout.ORDERS if interior == "plain" else HEAD_OUTSIDE))
    g = vllm_cache(
        order,
        layers=own_layers,
        blocks=-(-tokens // block_tokens) + draw(st.integers(1, 3)),
        heads=own_heads,
        block_tokens=block_tokens,
        parts=parts,
        interior=interior,
        dtype=dtype,
        first_head=first_head,
        first_layer=first_layer,
        total_heads=heads,
        total_layers=layers,
    )
    gap = st.one_of(st.just(0), st.integers(0, 8))
    return padded(g, order, {axis: draw(gap) for axis in "LBHN"} if draw(st.booleans()) else {})


def padded(g: Geometry, order: str, gaps: dict[str, int]) -> Geometry:
    """With so many unused elements behind each layer, block, head and token."""
    sizes = {"L": g.layers, "B": g.blocks, "H": g.heads, "N": g.block_tokens, "C": g.content}
    reached, strides = 1, {}
    for axis in reversed(order):
        packed = axis == "N" and g.interior != "plain"
        strides[axis] = reached + (0 if packed or axis == "C" else gaps.get(axis, 0))
        reached = strides[axis] * sizes[axis]
    return msgspec.structs.replace(g, strides=tuple(strides[axis] for axis in "LBHN"))


@st.composite
def models(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, str, str]:
    """Parts, heads, layers, and the types at source and target."""
    dim = st.sampled_from((1, 3, 4, 5, 8, 16, 20, 32, 33, 48, 64))
    mla = draw(st.booleans()) and draw(st.booleans())
    square = draw(st.booleans())
    key = draw(dim)
    parts = (key,) if mla else (key, key if square else draw(dim))
    heads = 1 if mla else draw(st.integers(1, 5))
    if draw(st.integers(0, 3)) == 0:
        types = draw(st.tuples(st.sampled_from(layout.FLOATS), st.sampled_from(layout.FLOATS)))
    else:
        types = (draw(st.sampled_from(tuple(layout.WIDTHS))),) * 2
    return parts, heads, draw(st.integers(1, 5)), *types


@st.composite
def pairs(draw: st.DrawFn, *, to_page: bool = False) -> Pair:
    """With `to_page` the target is canonical pages."""
    parts, heads, layers, source_type, target_type = draw(models())
    tokens = draw(st.integers(1, 100))
    source = draw(caches(parts=parts, heads=heads, layers=layers, dtype=source_type, tokens=tokens))
    if to_page:
        size = draw(st.sampled_from((16, 32, 48)))
        pages = -(-tokens // size)
        restricted = draw(st.booleans())
        target = canonical_pages(
            source,
            page_tokens=size,
            pages=pages,
            heads=(source.first_head, source.first_head + source.heads) if restricted else None,
            layers=(source.first_layer, source.first_layer + source.layers) if restricted else None,
            dtype=target_type,
        )
    else:
        # A share that reaches from 0 overlaps with every other that begins at 0; others are moved until they meet.
        target = draw(caches(parts=parts, heads=heads, layers=layers, dtype=target_type, tokens=tokens))
        target = msgspec.structs.replace(
            target,
            first_head=_meeting(target.first_head, target.heads, source.first_head, source.heads),
            first_layer=_meeting(target.first_layer, target.layers, source.first_layer, source.layers),
        )
    lo = draw(st.integers(0, tokens - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = [rng.permutation(g.blocks)[: -(-tokens // g.block_tokens)] for g in (source, target)]
    table = layout.segments(source, target, ids[0], ids[1], (lo, tokens))
    return Pair(source, target, table, (draw(shifts(source, target, 0)), draw(shifts(source, target, 1))))


@st.composite
def shifts(draw: st.DrawFn, source: Geometry, target: Geometry, side: int) -> Shift:
    """Any where rows are copied; multiples of the element elsewhere."""
    rows = source.dtype == target.dtype and has_rows(source) and has_rows(target)
    some = st.one_of(st.just(0), st.sampled_from(range(0, 16, 1 if rows else (source, target)[side].width)))
    return Shift(draw(some), draw(some))


def _meeting(first: int, count: int, other_first: int, other_count: int) -> int:
    """The nearest place for [first, first + count) to overlap [other_first, …)."""
    return max(other_first - count + 1, min(first, other_first + other_count - 1))
