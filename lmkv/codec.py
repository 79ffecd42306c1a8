"""Coded pages: canonical pages with one byte a number, and a scale for each group of tokens. Pure; see
docs/page-format.md for the bytes.

A coded page is [H][L][part], each an *area*: the codes [N][D], then one little-endian float32 scale for every 16
tokens. So a rank's heads are one contiguous range here too. As a geometry it is a cache of one token a block, whose
parts are the areas: `convert_blocks`, `pack_pages` and `unpack_pages` move and sum coded pages, and shares of them, as
they do others.
"""

from __future__ import annotations

import msgspec

from .errors import LayoutError
from .layout import FLOATS, Geometry, check

CODECS = ("fp8-e4m3", "int8")
CODEC_VERSION = 1
GROUP_TOKENS = 16
LARGEST = {"fp8-e4m3": 448.0, "int8": 127.0}
"""The code of a group's largest magnitude, by codec."""
NAN = {"fp8-e4m3": 0x7F, "int8": 0x80}
"""The code of what is not finite."""
SMALLEST_SCALE = 2.0**-126
"""Smaller ones would be subnormal; they are 0, and so are the numbers of the group."""


def groups(page_tokens: int) -> int:
    """Scales of an area; the last group may have fewer tokens."""
    return -(-page_tokens // GROUP_TOKENS)


def area_bytes(page_tokens: int, dims: int) -> int:
    return page_tokens * dims + 4 * groups(page_tokens)


def coded_pages(page: Geometry, *, pages: int | None = None) -> Geometry:
    """The geometry of `pages` coded pages, one after the other, of the heads and layers that `page` has."""
    if page.interior != "split" or page.dtype not in FLOATS:
        raise LayoutError(
            f"pages in {page.dtype} with the interior {page.interior!r} are not coded",
            hint=f"canonical pages in {', '.join(FLOATS)} are; see lmkv.layout.canonical_pages",
        )
    if any(page.block_tokens * dims % 4 for dims in page.parts):
        raise LayoutError(
            f"scales of pages of {page.block_tokens} tokens with {page.parts} elements would not be aligned",
            hint="tokens times elements of each part must be a multiple of 4",
        )
    areas = tuple(area_bytes(page.block_tokens, dims) for dims in page.parts)
    head = sum(areas) * page.layers
    coded = msgspec.structs.replace(
        page,
        blocks=pages or page.blocks,
        block_tokens=1,
        parts=areas,
        strides=(sum(areas), head * page.heads, head, 0),
        dtype="uint8",
        total_layers=page.model_layers,
        total_heads=page.model_heads,
    )
    check(coded)
    return coded
