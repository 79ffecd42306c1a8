"""`encode_pages` and `decode_pages`: canonical pages to coded ones and back. The ops on caches, and their reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from lmkv.codec import CODECS, GROUP_TOKENS, LARGEST, NAN, SMALLEST_SCALE, coded_pages, groups
from lmkv.errors import LayoutError
from lmkv.layout import window

from ._guard import kernel_errors, same_device
from .cache import TYPES, Cache, map_fields
from .ops import loaded
from .reference import DTYPES, elements, elements_of, part_map, rounded


@kernel_errors("encode_pages")
def encode_pages(pages: Cache, coded: Cache, codec: str, moves: ArrayLike | None = None) -> None:
    """Code canonical pages: the heads and layers that both caches have.

    `coded` has a geometry by lmkv.codec.coded_pages. `moves` is (P, 2), page and coded page, each at most once; by
    default page i becomes coded page i. Works on the current stream of the device. Raises LayoutError for what does not
    fit together, before anything is written.
    """
    page_side, coded_side, rest = _arguments(pages, coded, codec, moves)
    torch.ops.lmkv.encode_pages(*page_side, *coded_side, *rest)


@kernel_errors("decode_pages")
def decode_pages(coded: Cache, pages: Cache, codec: str, moves: ArrayLike | None = None) -> None:
    """The reverse; `moves` has the page first here too. The pages may be of another float type than those coded."""
    page_side, coded_side, rest = _arguments(pages, coded, codec, moves)
    torch.ops.lmkv.decode_pages(*coded_side, *page_side, *rest)


def _arguments(
    pages: Cache, coded: Cache, codec: str, moves: ArrayLike | None
) -> tuple[list[Any], list[Any], list[Any]]:
    """Of the ops: those of the pages, those of the coded pages, and the rest."""
    same_device("coding", pages=pages.data, coded=coded.data)
    g, h = pages.geometry, coded.geometry
    if codec not in CODECS:
        raise LayoutError(f"codec {codec!r} is unknown", hint=f"known: {', '.join(CODECS)}")
    if coded_pages(g).parts != h.parts or (h.dtype, h.block_tokens) != ("uint8", 1):
        raise LayoutError(
            f"coded pages of {g} have areas of {coded_pages(g).parts} bytes; those given have {h.parts} in {h.dtype}",
            hint="see lmkv.codec.coded_pages",
        )
    w = window(g, h)
    table = np.repeat(np.arange(min(g.blocks, h.blocks))[:, None], 2, axis=1) if moves is None else np.asarray(moves)
    table = np.ascontiguousarray(table.reshape(-1, 2), dtype=np.int32)
    for side, column, blocks in (("page", table[:, 0], g.blocks), ("coded page", table[:, 1], h.blocks)):
        if len(np.unique(column)) < len(column):
            raise LayoutError(f"a {side} is named twice in {column.tolist()}")
        if len(column) and not 0 <= column.min() <= column.max() < blocks:
            raise LayoutError(f"a {side} of {column.tolist()} is none of the {blocks} there are")
    page_side = [pages.data, pages.layers[w.source_layer : w.source_layer + w.layers], map_fields(pages.geometry)]
    coded_side = [coded.data, coded.layers[w.target_layer : w.target_layer + w.layers], map_fields(coded.geometry)]
    dims = [*g.parts, 0][:2]
    shape = [len(g.parts), *dims, w.heads, w.source_head, w.target_head, g.block_tokens]
    return page_side, coded_side, [torch.from_numpy(table), shape, TYPES[g.dtype], CODECS.index(codec)]


def encode_reference(
    pages: torch.Tensor,
    page_layers: torch.Tensor,
    page_map: Sequence[int],
    coded: torch.Tensor,
    coded_layers: torch.Tensor,
    coded_map: Sequence[int],
    moves: torch.Tensor,
    shape: Sequence[int],
    dtype: int,
    code: int,
) -> None:
    """The op in torch; bit for bit what the kernels do."""
    codec = CODECS[code]
    for at, area, page_layer, coded_layer in _areas(
        pages, page_layers, page_map, coded_layers, coded_map, moves, shape
    ):
        values = elements_of(pages, page_layer, DTYPES[dtype])[at].float()
        finite = values.isfinite()
        values = torch.where(finite, values, 0.0)
        largest = torch.stack([rows.abs().amax(dim=(0, 2)) for rows in values.split(GROUP_TOKENS)])  # (groups, heads)
        scales = largest / LARGEST[codec]
        scales = torch.where(scales >= SMALLEST_SCALE, scales, 0.0)
        inverses = torch.where(scales > 0, 1.0 / scales, 0.0)
        quotients = values * _by_token(inverses, len(values))
        codes = torch.where(finite, _codes(quotients, codec), NAN[codec])
        flat = torch.cat([codes.transpose(0, 1).flatten(1), _bytes(scales.T)], dim=1)
        elements_of(coded, coded_layer, torch.uint8)[area] = flat


def decode_reference(
    coded: torch.Tensor,
    coded_layers: torch.Tensor,
    coded_map: Sequence[int],
    pages: torch.Tensor,
    page_layers: torch.Tensor,
    page_map: Sequence[int],
    moves: torch.Tensor,
    shape: Sequence[int],
    dtype: int,
    code: int,
) -> None:
    """The op in torch; bit for bit what the kernels do."""
    for at, area, page_layer, coded_layer in _areas(
        pages, page_layers, page_map, coded_layers, coded_map, moves, shape
    ):
        tokens, heads, dims = at.shape
        flat = elements_of(coded, coded_layer, torch.uint8)[area]
        codes = flat[:, : tokens * dims].reshape(heads, tokens, dims).transpose(0, 1)
        scales = flat[:, tokens * dims :].contiguous().view(torch.float32).T
        values = _values(codes, CODECS[code]) * _by_token(scales, tokens)
        cache = elements_of(pages, page_layer, DTYPES[dtype])
        cache[at] = rounded(values, cache.dtype)


def _areas(
    pages: torch.Tensor,
    page_layers: torch.Tensor,
    page_map: Sequence[int],
    coded_layers: torch.Tensor,
    coded_map: Sequence[int],
    moves: torch.Tensor,
    shape: Sequence[int],
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int, int]]:
    """Of every page, layer and part: the elements (N, heads, D) in the pages and the bytes (heads, area) in the coded
    pages, both within a layer, and the layer's offset on either side."""
    parts, *dims, heads, page_head, coded_head, tokens = shape
    device = pages.device
    head, token = torch.arange(heads, device=device), torch.arange(tokens, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    for page, target in moves.tolist():
        for part in range(parts):
            d = torch.arange(dims[part], device=device)
            area = torch.arange(tokens * dims[part] + 4 * groups(tokens), device=device)
            at = elements(part_map(page_map, part), zero + page, head + page_head, token, d)
            bytes_at = elements(part_map(coded_map, part), zero + target, head + coded_head, zero, area)[0]
            for page_layer, coded_layer in zip(page_layers.tolist(), coded_layers.tolist(), strict=True):
                yield at, bytes_at, page_layer, coded_layer


def _by_token(by_group: torch.Tensor, tokens: int) -> torch.Tensor:
    """(groups, heads) to (tokens, heads, 1)."""
    return by_group.repeat_interleave(GROUP_TOKENS, dim=0)[:tokens, :, None]


def _codes(quotients: torch.Tensor, codec: str) -> torch.Tensor:
    if codec == "fp8-e4m3":
        largest = LARGEST[codec]
        return quotients.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)
    return quotients.round().to(torch.int8).view(torch.uint8)


def _values(codes: torch.Tensor, codec: str) -> torch.Tensor:
    codes = codes.contiguous()
    if codec == "fp8-e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    return torch.where(codes == NAN[codec], torch.nan, codes.view(torch.int8).float())


def _bytes(scales: torch.Tensor) -> torch.Tensor:
    return scales.clone(memory_format=torch.contiguous_format).view(torch.uint8)


for _device in ("cpu", "cuda"):
    if _device not in loaded:
        torch.library.impl("lmkv::encode_pages", _device, encode_reference)
        torch.library.impl("lmkv::decode_pages", _device, decode_reference)
