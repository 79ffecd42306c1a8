"""Where every number of a KV cache lies: geometries, index maps, segments. Pure; the oracle is `lmkv/oracle.py`.

A `Geometry` is data, not a class per layout. Of one layer it knows the strides of block, head and token, and the
*interior*: how the numbers of one (block, head) area lie.

    plain          token by token, K then V of a token (vLLM's [N, C]); the token stride is free (H may lie inside N)
    split          K of all tokens, then V: [N, Dk] [N, Dv]; the canonical page is this
    vec, vec16     K as [Dk, N], V as [N, Dv] (CPU attention with vector instructions)
    amx            K as [N/16, D/2, 16, 2], V as [D/16, N/2, 16, 2] (CPU attention with AMX tiles)

All of them are affine in the digits of token and dimension, with one power-of-two tile each (`PartMap`), so one index
map serves them all, here and in `csrc/include/lmkv/layout.h`. Offsets and strides are in elements unless a name says
`_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from .errors import LayoutError

ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
"""Physical orders of vLLM's logical cache [L, B, H, N, C]."""
INTERIORS = ("plain", "split", "vec", "vec16", "amx")
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1, "int8": 1, "uint8": 1}
"""Bytes an element by dtype."""
FLOATS = ("bfloat16", "float16", "float32")
"""Those that are converted into each other."""
PAGE_VERSION = 1
PAGE_ALIGNMENT_BYTES = 4096

Array = NDArray[np.int64]
Segments = NDArray[np.int32]
"""(S, 5): source block, first token in it, target block, first token in it, number of tokens."""


class Geometry(msgspec.Struct, frozen=True, array_like=True):
    """One KV group's cache in one place: the layers and heads that are there, and how they lie.

    `parts` are the elements of one token and head: (Dk, Dv), or (latent + rope,) for MLA, which has one head.
    """

    layers: int
    blocks: int
    heads: int
    block_tokens: int
    parts: tuple[int, ...]
    strides: tuple[int, int, int, int]
    """Of layer, block, head, token. The layer's is not used where layers have addresses of their own; the token's only
    by the interior `plain`."""
    interior: str = "plain"
    dtype: str = "bfloat16"
    first_layer: int = 0
    first_head: int = 0
    total_layers: int = 0
    total_heads: int = 0
    """Of the whole model; 0 stands for what is here."""

    @property
    def width(self) -> int:
        """Bytes an element."""
        return WIDTHS[self.dtype]

    @property
    def content(self) -> int:
        """Elements of one token and head."""
        return sum(self.parts)

    @property
    def model_layers(self) -> int:
        return self.total_layers or self.layers

    @property
    def model_heads(self) -> int:
        return self.total_heads or self.heads

    def layer_offsets_bytes(self) -> Array:
        """Of every layer here, from the cache's first byte, by the layer stride."""
        return np.arange(self.layers, dtype=np.int64) * (self.strides[0] * self.width)

    def span_bytes(self) -> int:
        """From the first byte of the first layer to the last of the last."""
        layer, block, head, token = self.strides
        last = layer * (self.layers - 1) + block * (self.blocks - 1) + head * (self.heads - 1)
        area = token * (self.block_tokens - 1) + self.content
        if self.interior != "plain":
            area = self.block_tokens * self.content
        return (last + area) * self.width


def vllm_cache(
    order: str,
    *,
    layers: int,
    blocks: int,
    heads: int,
    block_tokens: int,
    parts: tuple[int, ...],
    interior: str = "plain",
    dtype: str = "bfloat16",
    first_layer: int = 0,
    first_head: int = 0,
    total_layers: int = 0,
    total_heads: int = 0,
) -> Geometry:
    """The geometry of a dense cache in one of the six orders. Raises LayoutError for what no engine has."""
    if order not in ORDERS:
        raise LayoutError(f"order {order!r} is unknown", hint=f"known: {', '.join(ORDERS)}")
    sizes = {"L": layers, "B": blocks, "H": heads, "N": block_tokens, "C": sum(parts)}
    stride, strides = 1, {}
    for axis in reversed(order):
        strides[axis] = stride
        stride *= sizes[axis]
    if interior != "plain" and strides["N"] != sum(parts):
        raise LayoutError(f"interior {interior!r} needs the tokens of a head side by side; order {order} has not")
    found = Geometry(
        layers,
        blocks,
        heads,
        block_tokens,
        parts,
        (strides["L"], strides["B"], strides["H"], strides["N"]),
        interior,
        dtype,
        first_layer,
        first_head,
        total_layers,
        total_heads,
    )
    check(found)
    return found


def canonical_pages(
    model: Geometry,
    *,
    page_tokens: int,
    pages: int = 1,
    heads: tuple[int, int] | None = None,
    layers: tuple[int, int] | None = None,
    dtype: str | None = None,
) -> Geometry:
    """Canonical pages [H][L][K,V][N][D] of the model that `model` is a share of, one after the other.

    `heads` and `layers` (half-open) restrict them to a share; by default a page holds the whole model. See
    docs/page-format.md.
    """
    head_lo, head_hi = heads or (0, model.model_heads)
    layer_lo, layer_hi = layers or (0, model.model_layers)
    area = page_tokens * model.content
    head_stride = area * (layer_hi - layer_lo)
    page = msgspec.structs.replace(
        model,
        layers=layer_hi - layer_lo,
        blocks=pages,
        heads=head_hi - head_lo,
        block_tokens=page_tokens,
        strides=(area, head_stride * (head_hi - head_lo), head_stride, 0),
        interior="split",
        dtype=dtype or model.dtype,
        first_layer=layer_lo,
        first_head=head_lo,
        total_layers=model.model_layers,
        total_heads=model.model_heads,
    )
    check(page)
    return page


def page_bytes(page: Geometry) -> int:
    """Bytes of one canonical page, without what aligns the next one."""
    return page.strides[1] * page.width


def check(g: Geometry) -> None:
    """Raises LayoutError unless the geometry can exist."""
    if g.interior not in INTERIORS:
        raise LayoutError(f"interior {g.interior!r} is unknown", hint=f"known: {', '.join(INTERIORS)}")
    if g.dtype not in WIDTHS:
        raise LayoutError(f"dtype {g.dtype!r} is unknown", hint=f"known: {', '.join(WIDTHS)}")
    if min(g.layers, g.blocks, g.heads, g.block_tokens, *g.parts) < 1 or len(g.parts) not in (1, 2):
        raise LayoutError(f"a geometry has one or two parts, and sizes from 1 up; got {g}")
    if g.first_head + g.heads > g.model_heads or g.first_layer + g.layers > g.model_layers:
        raise LayoutError(f"heads or layers of {g} exceed the model's {g.model_heads} and {g.model_layers}")
    if g.interior in ("vec", "vec16", "amx") and (len(g.parts) != 2 or g.parts[0] != g.parts[1]):
        raise LayoutError(f"interior {g.interior!r} has K and V of one size, not parts {g.parts}")
    if g.interior == "amx" and (g.block_tokens % 16 or g.parts[0] % 16 or g.width != 2):
        raise LayoutError(
            f"interior 'amx' needs tokens and dimensions in sixteens and 2-byte elements, not {g.block_tokens}, "
            f"{g.parts[0]}, {g.dtype}"
        )


@dataclass(frozen=True, slots=True)
class PartMap:
    """Element offset, within a layer, of token n and dimension d of one part:

    offset + block·b + head·h + n1·(n >> tn) + n0·(n mod 2^tn) + d1·(d >> td) + d0·(d mod 2^td)
    """

    offset: int
    block: int
    head: int
    n1: int
    n0: int = 0
    d1: int = 1
    d0: int = 0
    tn: int = 0
    td: int = 0

    def fields(self) -> tuple[int, ...]:
        """As the compiled kernels take it."""
        return self.offset, self.block, self.head, self.n1, self.n0, self.d1, self.d0, self.tn, self.td

    def element(self, block: Array, head: Array, n: Array, d: Array) -> Array:
        """Broadcasts."""
        low_n, low_d = (1 << self.tn) - 1, (1 << self.td) - 1
        token = self.n1 * (n >> self.tn) + self.n0 * (n & low_n)
        return np.asarray(
            self.offset
            + self.block * block
            + self.head * head
            + token
            + self.d1 * (d >> self.td)
            + self.d0 * (d & low_d)
        )


def part_maps(g: Geometry) -> tuple[PartMap, ...]:
    _, block, head, token = g.strides
    n, maps, before = g.block_tokens, [], 0
    for i, d in enumerate(g.parts):
        is_key = i == 0
        match g.interior:
            case "plain":
                found = PartMap(before, block, head, n1=token)
            case "vec" | "vec16" if is_key:
                found = PartMap(n * before, block, head, n1=1, d1=n)
            case "amx" if is_key:
                found = PartMap(n * before, block, head, n1=16 * d, n0=2, d1=32, d0=1, tn=4, td=1)
            case "amx":
                found = PartMap(n * before, block, head, n1=32, n0=1, d1=16 * n, d0=2, tn=1, td=4)
            case _:  # split, and V of vec
                found = PartMap(n * before, block, head, n1=d)
        maps.append(found)
        before += d
    return tuple(maps)


def segments(
    source: Geometry,
    target: Geometry,
    source_blocks: Sequence[int] | Array,
    target_blocks: Sequence[int] | Array,
    tokens: tuple[int, int],
    *,
    source_first: int = 0,
    target_first: int = 0,
) -> Segments:
    """The maximal runs of `tokens` (half-open) that lie in one block on either side.

    Entry i of `source_blocks` holds tokens from `source_first + i · block_tokens` on; likewise `target_blocks`. Runs
    whose target block is negative are left out (nobody wants them). Raises LayoutError for tokens without a block.
    """
    lo, hi = tokens
    ids_s, ids_t = np.asarray(source_blocks, dtype=np.int64), np.asarray(target_blocks, dtype=np.int64)
    for side, g, ids, first in (("source", source, ids_s, source_first), ("target", target, ids_t, target_first)):
        if lo < first or hi > first + len(ids) * g.block_tokens:
            raise LayoutError(
                f"tokens [{lo}, {hi}) are not in the {side}'s {len(ids)} blocks of {g.block_tokens} tokens from {first}"
            )
    if lo >= hi:
        return np.empty((0, 5), dtype=np.int32)
    cuts_s = np.arange(source_first, hi, source.block_tokens, dtype=np.int64)
    cuts_t = np.arange(target_first, hi, target.block_tokens, dtype=np.int64)
    # The two grids of blocks need not be aligned to each other: their union gives the cuts.
    starts = np.unique(np.concatenate([cuts_s, cuts_t, [lo]]))
    starts = starts[starts >= lo]
    counts = np.diff(np.append(starts, hi))
    at_s, n_s = np.divmod(starts - source_first, source.block_tokens)
    at_t, n_t = np.divmod(starts - target_first, target.block_tokens)
    table = np.stack([ids_s[at_s], n_s, ids_t[at_t], n_t, counts], axis=1)
    return table[table[:, 2] >= 0].astype(np.int32)


@dataclass(frozen=True, slots=True)
class Window:
    """The heads and layers that two places share: where they begin on either side, and how many."""

    source_head: int
    target_head: int
    heads: int
    source_layer: int
    target_layer: int
    layers: int


def window(source: Geometry, target: Geometry) -> Window:
    """Raises LayoutError when they share nothing."""
    head = max(source.first_head, target.first_head)
    heads = min(source.first_head + source.heads, target.first_head + target.heads) - head
    layer = max(source.first_layer, target.first_layer)
    layers = min(source.first_layer + source.layers, target.first_layer + target.layers) - layer
    if heads < 1 or layers < 1:
        raise LayoutError(
            f"no heads and layers in common: source has heads from {source.first_head} ({source.heads}) and layers "
            f"from {source.first_layer} ({source.layers}), target {target.first_head} ({target.heads}) and "
            f"{target.first_layer} ({target.layers})"
        )
    return Window(
        head - source.first_head,
        head - target.first_head,
        heads,
        layer - source.first_layer,
        layer - target.first_layer,
        layers,
    )


def refusal(source: Geometry, target: Geometry, *, convert_dtype: bool = False) -> str:
    """Why KV of `source` cannot be converted to `target`; empty when it can."""
    if source.parts != target.parts:
        return f"a token has parts of {source.parts} elements at the source and {target.parts} at the target"
    if source.model_heads != target.model_heads or source.model_layers != target.model_layers:
        return (
            f"the source's model has {source.model_layers} layers of {source.model_heads} heads, the target's "
            f"{target.model_layers} of {target.model_heads}"
        )
    if source.dtype == target.dtype:
        return ""
    if source.dtype not in FLOATS or target.dtype not in FLOATS:
        return f"{source.dtype} is not converted to {target.dtype}"
    if not convert_dtype:
        return f"converting {source.dtype} to {target.dtype} changes the numbers; it has to be allowed (convert_dtype)"
    return ""
