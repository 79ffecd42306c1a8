"""The ops on caches. Each takes whole tables of segments (lmkv.layout.segments) and touches nothing else.

They run on the current stream of the target's device; on the CPU they return when done. All raise LayoutError for
geometries that do not fit together and for caches on two devices, before anything is written, and KernelError for what
fails in torch or on the device.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lmkv import layout
from lmkv.errors import LayoutError
from lmkv.layout import Geometry, Segments, Window

from . import _load, reference
from ._guard import kernel_errors, same_device
from .cache import TYPES, Cache, map_fields

_load.declare()
loaded: dict[str, Path] = _load.load()
"""The compiled libraries in use by device; the reference runs on the others."""
reference.register([device.upper() for device in ("cpu", "cuda") if device not in loaded])


@kernel_errors("convert_blocks")
def convert_blocks(source: Cache, target: Cache, segments: Segments, *, convert_dtype: bool = False) -> None:
    """Copy the heads and layers that both have from `source` to `target`, in one pass."""
    whole = _Call("convert_blocks", source, target, segments, convert_dtype)
    parts, source_maps, target_maps = _widest(source.geometry, target.geometry, segments)
    torch.ops.lmkv.convert_blocks(
        source.data,
        whole.source_layers,
        source_maps,
        target.data,
        whole.target_layers,
        target_maps,
        whole.segments,
        whole.shape(parts),
        *whole.types,
    )


@kernel_errors("pack_pages")
def pack_pages(source: Cache, pages: Cache, segments: Segments, *, convert_dtype: bool = False) -> torch.Tensor:
    """Blocks into canonical pages. Returns the checksums (pages,) of the rows written, as int64 bit patterns."""
    return _with_sums("pack_pages", source, pages, segments, pages, convert_dtype)


@kernel_errors("unpack_pages")
def unpack_pages(pages: Cache, target: Cache, segments: Segments, *, convert_dtype: bool = False) -> torch.Tensor:
    """Canonical pages into blocks. Returns the checksums (pages,) of the rows read, as int64 bit patterns: who knows
    what they should be compares, and gives the blocks up where they differ."""
    return _with_sums("unpack_pages", pages, target, segments, pages, convert_dtype)


class _Call:
    """What every op needs of a pair of caches."""

    def __init__(self, op: str, source: Cache, target: Cache, segments: Segments, convert_dtype: bool) -> None:
        same_device(op, source=source.data, target=target.data)
        if why := layout.refusal(source.geometry, target.geometry, convert_dtype=convert_dtype):
            raise LayoutError(why)
        self.window: Window = layout.window(source.geometry, target.geometry)
        w = self.window
        self.source_layers = source.layers[w.source_layer : w.source_layer + w.layers]
        self.target_layers = target.layers[w.target_layer : w.target_layer + w.layers]
        self.segments = torch.from_numpy(np.ascontiguousarray(segments, dtype=np.int32).reshape(-1, 5))
        self.types = (TYPES[source.geometry.dtype], TYPES[target.geometry.dtype])

    def shape(self, parts: tuple[int, ...]) -> list[int]:
        dims = [*parts, 0] if len(parts) == 1 else list(parts)
        return [len(parts), *dims, self.window.heads, self.window.source_head, self.window.target_head]


def _with_sums(
    op: str, source: Cache, target: Cache, segments: Segments, pages: Cache, convert_dtype: bool
) -> torch.Tensor:
    call, g = _Call(op, source, target, segments, convert_dtype), pages.geometry
    if g.interior != "split":
        raise LayoutError(f"pages have the interior 'split', not {g.interior!r}; see lmkv.layout.canonical_pages")
    w = call.window
    head = w.target_head if target is pages else w.source_head
    layer = w.target_layer if target is pages else w.source_layer
    page = [g.first_head + head, g.first_layer + layer, g.model_layers, g.block_tokens]
    sums = torch.zeros(g.blocks, dtype=torch.int64, device=pages.data.device)
    getattr(torch.ops.lmkv, op)(
        source.data,
        call.source_layers,
        map_fields(source.geometry),
        target.data,
        call.target_layers,
        map_fields(target.geometry),
        sums,
        call.segments,
        call.shape(g.parts),
        page,
        *call.types,
    )
    return sums


def _widest(source: Geometry, target: Geometry, segments: Segments) -> tuple[tuple[int, ...], list[int], list[int]]:
    """Parts and maps for a plain copy, in as few and long runs as possible.

    K and V side by side on both sides are one part. Whole blocks of one interior and size are so too, whatever that
    interior is: each (block, head) area is copied as it is.
    """
    c = source.content
    same = source.interior == target.interior and source.dtype == target.dtype
    if same and source.interior == "plain":
        maps = [layout.PartMap(0, g.strides[1], g.strides[2], n1=g.strides[3]) for g in (source, target)]
        return (c,), list(maps[0].fields()), list(maps[1].fields())
    whole = source.block_tokens == target.block_tokens and bool(np.all(segments[:, 4] == source.block_tokens))
    if same and whole:
        maps = [layout.PartMap(0, g.strides[1], g.strides[2], n1=c) for g in (source, target)]
        return (c,), list(maps[0].fields()), list(maps[1].fields())
    return source.parts, map_fields(source), map_fields(target)
