"""Conversions of KV between geometries: compiled for CPU and CUDA, with a reference in torch where nothing is compiled.

    convert_blocks(source, target, segments)        blocks of any geometry into blocks of any other
    pack_pages(source, pages, segments)             blocks into canonical pages; returns the pages' checksums
    unpack_pages(pages, target, segments)           the reverse; returns the checksums of what it has read
    rotate_keys(cache, runs, offsets, rope)         keys moved to other positions, in place
    encode_pages(pages, coded, codec)               canonical pages with one byte a number
    decode_pages(coded, pages, codec)               the reverse
    checksum_runs(data, runs)                       the checksum of bytes wherever they lie

All raise LayoutError for what does not fit together (tensors of two devices, too), and KernelError for what torch or
the device makes of it.

`python -m lmkv.kernels` says what is loaded and proves it.
"""

from ._guard import kernel_errors
from .cache import Cache
from .checksum import checksum_runs
from .codec import decode_pages, encode_pages
from .ops import convert_blocks, loaded, pack_pages, unpack_pages
from .rotate import rotate_keys
from .selftest import selftest

__all__ = [
    "Cache",
    "checksum_runs",
    "convert_blocks",
    "decode_pages",
    "encode_pages",
    "kernel_errors",
    "loaded",
    "pack_pages",
    "rotate_keys",
    "selftest",
    "unpack_pages",
]
