"""Which prefill rank sends which heads to which decode rank. Both sides compute it from the cards, and agree.

Ranks of one engine split the heads among them, or hold the same ones (fewer heads than ranks; MLA). A decode rank gets
each of its heads from exactly one prefill rank; where several hold it, decode rank d takes the (d mod n)-th of them, so
that the load spreads.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmkv.errors import LayoutError
from lmkv.ids import Rank
from lmkv.layout import Geometry

Heads = tuple[int, int]
"""Half-open range of the model's heads."""


def routes(prefill: Sequence[Geometry], decode: Sequence[Geometry]) -> dict[tuple[Rank, Rank], Heads]:
    """(prefill rank, decode rank) → heads, for one KV group; entry r of either list is rank r's geometry.

    Raises LayoutError when a head is nowhere, or when a rank would have to send heads that are not side by side.
    """
    found: dict[tuple[Rank, Rank], Heads] = {}
    for d, target in enumerate(decode):
        for head in range(target.first_head, target.first_head + target.heads):
            holders = [p for p, g in enumerate(prefill) if g.first_head <= head < g.first_head + g.heads]
            if not holders:
                raise LayoutError(f"head {head}, which decode rank {d} needs, is on no prefill rank")
            pair = Rank(holders[d % len(holders)]), Rank(d)
            lo, hi = found.get(pair, (head, head))
            if hi != head:
                raise LayoutError(f"prefill rank {pair[0]} holds heads {lo}–{hi - 1} and {head} for decode rank {d}")
            found[pair] = (lo, head + 1)
    return found


def engine_routes(
    prefill: Sequence[Sequence[Geometry]], decode: Sequence[Sequence[Geometry]]
) -> dict[tuple[Rank, Rank], tuple[Heads, ...]]:
    """(prefill rank, decode rank) → heads by KV group; entry r of either list is rank r's geometries by group.

    Raises LayoutError as `routes` does, and when groups would go different ways.
    """
    groups = len(decode[0]) if decode else 0
    by_group = [routes([rank[g] for rank in prefill], [rank[g] for rank in decode]) for g in range(groups)]
    for group, found in enumerate(by_group):
        if found.keys() != by_group[0].keys():
            raise LayoutError(f"KV group {group} would go between other ranks than group 0")
    return {pair: tuple(found[pair] for found in by_group) for pair in (by_group[0] if by_group else ())}
