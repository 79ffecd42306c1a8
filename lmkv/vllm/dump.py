"""KV written to files, so that tests can compare what both sides hold. Only with `debug_dump_dir`.

In direct mode a file has the blocks' bytes; in landing mode the canonical page of the granted tokens with this rank's
heads, in decode's dtype or prefill's own: equal bytes then mean equal numbers, whatever the layouts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmkv.kernels import Cache, pack_pages
from lmkv.layout import canonical_pages, segments
from lmkv.transfer.landing import kernel_ids

from .memory import KvMemory, Runs


def dump_runs(path: Path, runs: Runs) -> None:
    """The bytes of the runs, in order. Host memory only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        for address, size in runs.tolist():
            file.write((ctypes.c_char * size).from_address(address))
    partial.rename(path)


def dump_page(
    path: Path, found: KvMemory, group: int, block_ids: Sequence[int], tokens: tuple[int, int], first_token: int
) -> None:
    """Tokens [lo, hi) of one group as one page. `block_ids`: manager blocks from that of `first_token` on."""
    g = found.geometries[group]
    lo, hi = tokens
    storage, layers = found.storages[group], found.layer_offsets(group)
    page = canonical_pages(g, page_tokens=hi - lo, heads=(g.first_head, g.first_head + g.heads))
    source, target = Cache.of(storage, g, layers), Cache.empty(page, storage.device)
    ids = kernel_ids(block_ids, found.block_tokens[group] // g.block_tokens)
    pack_pages(source, target, segments(g, page, ids, [0], tokens, source_first=first_token, target_first=lo))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    np.asarray(target.data.cpu()).tofile(partial)
    partial.rename(path)
