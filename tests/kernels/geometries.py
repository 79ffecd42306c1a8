"""Random geometries and what the three implementations make of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import msgspec
import numpy as np
import torch
from hypothesis import strategies as st

from lmkv import layout, oracle
from lmkv.kernels import Cache, reference
from lmkv.layout import Geometry, Segments, canonical_pages, vllm_cache

PACKED_ORDERS = ("LBHNC", "LHBNC", "BLHNC", "BHLNC")
"""Those in which the tokens of a head lie side by side, as packed interiors need it."""
GUARD_BYTES = 128


@dataclass(frozen=True, slots=True)
class Pair:
    source: Geometry
    target: Geometry
    segments: Segments
    seed: int


def place(g: Geometry, seed: int) -> oracle.Place:
    """Random bytes, so floats of every kind. Some before, between and behind the layers belong to nobody; layers lie in
    random order."""
    rng = np.random.default_rng(seed)
    one = msgspec.structs.replace(g, layers=1, first_layer=0, total_layers=0)
    each = -(-one.span_bytes() // 4) * 4 + GUARD_BYTES
    apart = g.strides[0] * g.width >= one.span_bytes()
    if apart:
        offsets = GUARD_BYTES + rng.permutation(g.layers).astype(np.int64) * each
        size = g.layers * each + GUARD_BYTES
    else:  # BLHNC, BLNHC, BHLNC: layers lie within a block
        offsets = GUARD_BYTES + g.layer_offsets_bytes()
        size = g.span_bytes() + 2 * GUARD_BYTES
    return oracle.Place(rng.integers(0, 256, size, dtype=np.uint8), offsets, g)


def same(p: oracle.Place) -> oracle.Place:
    """Another place with the same bytes."""
    return oracle.Place(p.data.copy(), p.layers, p.geometry)


def cache(p: oracle.Place) -> Cache:
    """Over the place's own memory."""
    return Cache.of(torch.from_numpy(p.data), p.geometry, p.layers)


def unsigned(sums: torch.Tensor) -> list[int]:
    return [int(s) for s in sums.numpy().view(np.uint64)]


@contextmanager
def torch_reference() -> Iterator[None]:
    """lmkv.kernels runs lmkv.kernels.reference instead of what is compiled."""
    with mock.patch.multiple(
        torch.ops.lmkv,
        convert_blocks=reference.convert_blocks,
        pack_pages=reference.pack_pages,
        unpack_pages=reference.unpack_pages,
    ):
        yield


def ranges(size: int) -> st.SearchStrategy[tuple[int, int]]:
    """(first, count) of a share."""
    return st.integers(0, size - 1).flatmap(lambda first: st.tuples(st.just(first), st.integers(1, size - first)))


@st.composite
def caches(
    draw: st.DrawFn, parts: tuple[int, ...], heads: int, layers: int, dtype: str, tokens: int, meet: tuple[int, int]
) -> Geometry:
    """A share of a model that has head meet[0] and layer meet[1]."""
    interiors = ["plain", "plain", "split"]
    if len(parts) == 2 and parts[0] == parts[1]:
        interiors += ["vec", "vec", "vec16"]
        if parts[0] % 16 == 0 and layout.WIDTHS[dtype] == 2:
            interiors += ["amx", "amx", "amx"]
    interior = draw(st.sampled_from(interiors))
    sizes = (16, 32, 64, 128, 256) if interior == "amx" else (1, 3, 16, 24, 32, 64, 128, 256)
    n = draw(st.sampled_from(sizes))
    first_head, first_layer = draw(st.integers(0, meet[0])), draw(st.integers(0, meet[1]))
    g = vllm_cache(
        draw(st.sampled_from(layout.ORDERS if interior == "plain" else PACKED_ORDERS)),
        layers=draw(st.integers(meet[1] - first_layer + 1, layers - first_layer)),
        blocks=-(-tokens // n) + draw(st.integers(1, 2)),
        heads=draw(st.integers(meet[0] - first_head + 1, heads - first_head)),
        block_tokens=n,
        parts=parts,
        interior=interior,
        dtype=dtype,
        first_head=first_head,
        first_layer=first_layer,
        total_heads=heads,
        total_layers=layers,
    )
    room = draw(st.sampled_from((1, 1, 2)))
    return msgspec.structs.replace(g, strides=tuple(s * room for s in g.strides))


@st.composite
def pairs(draw: st.DrawFn, *, to_pages: bool = False, converts: bool = True) -> Pair:
    """Two shares that have something in common, and tokens to be copied. With `to_pages` the target is pages."""
    dims = st.sampled_from((1, 3, 8, 16, 16, 20, 32, 48, 64))
    mla = draw(st.sampled_from((True, False, False)))
    key = draw(dims)
    parts = (key,) if mla else (key, draw(st.sampled_from((key, key, draw(dims)))))
    heads, layers = 1 if mla else draw(st.integers(1, 6)), draw(st.integers(1, 3))
    source_type = draw(st.sampled_from(tuple(layout.WIDTHS)))
    target_type = draw(st.sampled_from(layout.FLOATS)) if converts and source_type in layout.FLOATS else source_type
    tokens = draw(st.integers(1, 300))
    meet = (draw(st.integers(0, heads - 1)), draw(st.integers(0, layers - 1)))
    source = draw(caches(parts, heads, layers, source_type, tokens, meet))
    if to_pages:
        size = draw(st.sampled_from((16, 64, 256)))
        whole = draw(st.booleans())
        target = canonical_pages(
            source,
            page_tokens=size,
            pages=-(-tokens // size),
            heads=None if whole else (source.first_head, source.first_head + source.heads),
            layers=None if whole else (source.first_layer, source.first_layer + source.layers),
            dtype=target_type,
        )
    else:
        target = draw(caches(parts, heads, layers, target_type, tokens, meet))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    lo = draw(st.integers(0, tokens - 1))
    ids = [rng.permutation(g.blocks)[: -(-tokens // g.block_tokens)] for g in (source, target)]
    return Pair(source, target, layout.segments(source, target, *ids, (lo, tokens)), seed)
