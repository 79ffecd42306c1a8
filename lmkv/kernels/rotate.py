"""`rotate_keys`: cached keys moved to other positions, in place. The op on caches, and its reference in torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lmkv.errors import LayoutError
from lmkv.layout import FLOATS, Array, Geometry, part_maps
from lmkv.rope import Rope

from ._guard import kernel_errors
from .cache import TYPES, Cache
from .ops import loaded
from .reference import DTYPES, elements, elements_of, part_map, rounded

Runs = NDArray[np.int32]
"""(R, 3): block, first token in it, number of tokens. Columns 2 to 4 of lmkv.layout.Segments are runs of the target."""


@kernel_errors("rotate_keys")
def rotate_keys(cache: Cache, runs: Runs, offsets: int | ArrayLike, rope: Rope) -> None:
    """Move the keys of each run by its offset of tokens: what was computed at p is then as computed at p + offset.

    All layers and heads that the cache has; values are not touched, nor is a run with offset 0. `offsets` is one number
    or one for each run. Runs must not overlap, or a key would be turned twice. Works on the current stream of the
    cache's device. Raises LayoutError for keys that the embedding does not fit, before anything is written.
    """
    g = cache.geometry
    if g.dtype not in FLOATS:
        raise LayoutError(f"keys in {g.dtype} cannot be re-positioned", hint=f"known: {', '.join(FLOATS)}")
    if rope.first + 2 * rope.pairs > g.parts[0]:
        raise LayoutError(
            f"{rope.pairs} pairs from dimension {rope.first} on are not in keys of {g.parts[0]} elements",
            hint="does the config belong to this cache?",
        )
    table, turns = _table(runs, offsets, rope, g)
    torch.ops.lmkv.rotate_keys(
        cache.data,
        cache.layers,
        list(part_maps(g)[0].fields()),
        torch.from_numpy(table),
        torch.from_numpy(turns).to(cache.data.device, non_blocking=True),
        [g.heads, rope.first, rope.pairs, int(rope.interleaved)],
        TYPES[g.dtype],
    )


def _table(
    runs: Runs, offsets: int | ArrayLike, rope: Rope, g: Geometry
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(R, 4): the runs that move, and the row of each in the table of turns, one for each different offset."""
    rows = np.asarray(runs, dtype=np.int64).reshape(-1, 3)
    by = _by_run(offsets, len(rows))
    _require_within(rows, g)
    rows, by = rows[by != 0], by[by != 0]
    _require_disjoint(rows)
    different, which = np.unique(by, return_inverse=True)
    table = np.concatenate([rows, which.reshape(-1, 1)], axis=1)
    return np.ascontiguousarray(table, dtype=np.int32), rope.turns(different)


def _by_run(offsets: int | ArrayLike, runs: int) -> Array:
    given = np.asarray(offsets)
    if given.size and given.dtype.kind not in "iu":
        raise LayoutError(f"offsets are whole tokens, not {given.dtype}")
    if given.shape not in ((), (runs,)):
        raise LayoutError(f"offsets of shape {given.shape} for {runs} runs", hint="pass one number, or one for each")
    return np.broadcast_to(given.astype(np.int64), runs)


def _require_within(rows: Array, g: Geometry) -> None:
    """The compiled ops check their memory; the reference would take a negative index for one from the end."""
    block, token, tokens = rows.T
    outside = (block < 0) | (block >= g.blocks) | (token < 0) | (tokens < 1) | (token + tokens > g.block_tokens)
    if outside.any():
        b, first, count = rows[outside][0].tolist()
        raise LayoutError(
            f"a run has tokens [{first}, {first + count}) of block {b}; the cache has {g.blocks} blocks of "
            f"{g.block_tokens}, and a run at least one token"
        )


def _require_disjoint(rows: Array) -> None:
    ordered = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    ends = ordered[:-1, 1] + ordered[:-1, 2]
    twice = (ordered[1:, 0] == ordered[:-1, 0]) & (ordered[1:, 1] < ends)
    if twice.any():
        block, token, _ = ordered[1:][twice][0]
        raise LayoutError(f"token {token} of block {block} is in two runs", hint="a key is turned once a call")


def reference(
    keys: torch.Tensor,
    layers: torch.Tensor,
    fields: Sequence[int],
    runs: torch.Tensor,
    turns: torch.Tensor,
    shape: Sequence[int],
    dtype: int,
) -> None:
    """The op in torch; bit for bit what the kernels do."""
    heads, first, pairs, interleaved = shape
    table = runs.to(keys.device, torch.int64)
    counts = table[:, 2]
    within = torch.arange(int(counts.sum()), device=keys.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    blocks, tokens = table[:, 0].repeat_interleave(counts), table[:, 1].repeat_interleave(counts) + within
    angles = turns[table[:, 3].repeat_interleave(counts)][:, :, None, :]  # (tokens, 2, 1, pairs)
    cosines, sines = angles[:, 0], angles[:, 1]

    i = torch.arange(pairs, device=keys.device)
    dims = (first + 2 * i, first + 2 * i + 1) if interleaved else (first + i, first + pairs + i)
    head = torch.arange(heads, device=keys.device)
    at_a, at_b = (elements(part_map(fields, 0), blocks, head, tokens, d) for d in dims)
    for offset in layers.tolist():
        cache = elements_of(keys, offset, DTYPES[dtype])
        a, b = cache[at_a].float(), cache[at_b].float()
        cache[at_a] = rounded(a * cosines - b * sines, cache.dtype)
        cache[at_b] = rounded(b * cosines + a * sines, cache.dtype)


for _device in ("cpu", "cuda"):
    if _device not in loaded:
        torch.library.impl("lmkv::rotate_keys", _device, reference)
