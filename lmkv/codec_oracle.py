"""What encode_pages and decode_pages have to compute, in numpy and as plainly as it can be said: lmkv/oracle.py's part
for coded pages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .codec import GROUP_TOKENS, LARGEST, NAN, SMALLEST_SCALE
from .layout import Array, Geometry, window
from .oracle import Bytes, Place, element_bytes, from_float, one_nan, to_float

Moves = NDArray[np.int32]
"""(P, 2): page, coded page."""


def encode(pages: Place, coded: Place, moves: Moves, codec: str) -> None:
    """Code the heads and layers that both places have."""
    for page, area in _areas(pages, coded, moves):
        values = _read(pages, page)
        for group, first in enumerate(range(0, len(values), GROUP_TOKENS)):
            scale, codes = encode_group(values[first : first + GROUP_TOKENS], codec)
            at = first * values.shape[1]
            coded.data[area[at : at + codes.size]] = codes.ravel()
            at = values.size + 4 * group
            coded.data[area[at : at + 4]] = np.frombuffer(scale.tobytes(), dtype=np.uint8)


def decode(coded: Place, pages: Place, moves: Moves, codec: str) -> None:
    """The reverse; `moves` has the page first here too."""
    for page, area in _areas(pages, coded, moves):
        codes = coded.data[area[: page.size]].reshape(page.shape)
        scales = np.repeat(coded.data[area[page.size :]].view("<f4"), GROUP_TOKENS)[: len(page), None]
        with np.errstate(invalid="ignore", over="ignore"):
            values = one_nan(code_values(codec)[codes] * scales)
            out = from_float(values, pages.geometry.dtype)
        pages.data[page[..., None] + np.arange(pages.geometry.width)] = out


def encode_group(values: NDArray[np.float32], codec: str) -> tuple[np.float32, Bytes]:
    """The group's scale, and a code for each number."""
    finite = np.isfinite(values)
    largest = np.abs(values[finite]).max(initial=np.float32(0))
    scale = largest / np.float32(LARGEST[codec])
    scale = scale if scale >= SMALLEST_SCALE else np.float32(0)
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    quotients = np.where(finite, values, np.float32(0)) * inverse
    codes = _nearest_fp8(quotients) if codec == "fp8-e4m3" else np.rint(quotients).astype(np.int8).view(np.uint8)
    return scale, np.where(finite, codes, np.uint8(NAN[codec]))


def code_values(codec: str) -> NDArray[np.float32]:
    """(256,): the number of each code, before it is scaled."""
    codes = np.arange(256, dtype=np.uint8)
    if codec == "int8":
        values = codes.view(np.int8).astype(np.float32)
    else:
        exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
        normal, subnormal = np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6)
        values = np.where(exponent > 0, normal, subnormal).astype(np.float32)
        values = np.where(codes & 0x80, -values, values)
        values[0x7F] = np.nan
    values[0x80 if codec == "int8" else 0xFF] = np.nan
    return values


def _nearest_fp8(quotients: NDArray[np.float32]) -> Bytes:
    """Of two codes that are equally near, the even one; the sign stays, of zeros too."""
    known = code_values("fp8-e4m3")[:0x7F].astype(np.float64)
    exact = np.abs(quotients).astype(np.float64)
    above = np.clip(np.searchsorted(known, exact), 1, 0x7E)
    below = above - 1
    gap_above, gap_below = known[above] - exact, exact - known[below]
    even_is_above = above % 2 == 0
    up = (gap_above < gap_below) | ((gap_above == gap_below) & even_is_above)
    sign = np.signbit(quotients).astype(np.uint8) << 7
    return np.asarray(np.where(up, above, below) | sign, dtype=np.uint8)


def _areas(pages: Place, coded: Place, moves: Moves) -> Iterator[tuple[Array, Array]]:
    """Of every area: where its numbers (N, D) lie among the pages' bytes, and where its own bytes do."""
    w = window(pages.geometry, coded.geometry)
    tokens = np.arange(pages.geometry.block_tokens, dtype=np.int64)
    zero = np.zeros(1, dtype=np.int64)
    for page, target in moves.astype(np.int64):
        for layer in range(w.layers):
            for head in range(w.heads):
                for part in range(len(pages.geometry.parts)):
                    blocks = np.full(len(tokens), page)
                    at = element_bytes(pages, w.source_layer + layer, part, w.source_head + head, blocks, tokens)
                    area = element_bytes(coded, w.target_layer + layer, part, w.target_head + head, zero + target, zero)
                    yield at, area[0]


def _read(place: Place, at: Array) -> NDArray[np.float32]:
    g: Geometry = place.geometry
    return to_float(place.data[at[..., None] + np.arange(g.width)], g.dtype)
