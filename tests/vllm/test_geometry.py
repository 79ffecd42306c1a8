"""The geometry found in an engine's tensors, and what two engines have to do with each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lmkv import wire
from lmkv.errors import CompatError
from lmkv.ids import EngineName, Incarnation, Rank
from lmkv.layout import ORDERS, Geometry, part_maps, vllm_cache
from lmkv.vllm.fingerprint import compare, is_direct
from lmkv.vllm.geometry import Shard, geometries, storage_bytes
from lmkv.vllm.meeting import meeting


@dataclass
class FullAttentionSpec:
    head_size: int
    head_size_v: int


@dataclass
class MLAAttentionSpec:
    head_size: int


@dataclass
class Group:
    kv_cache_spec: FullAttentionSpec | MLAAttentionSpec


SIZES = {"L": 3, "B": 5, "H": 2, "N": 4, "C": 12}
NAMES = (("a", "b", "c"),)


def caches(order: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """vLLM's views [B, H, N, C] of one storage in a physical order, filled with 0, 1, 2, …"""
    whole = torch.arange(np.prod(list(SIZES.values())), dtype=torch.int16).view(dtype)
    physical = whole.view([SIZES[axis] for axis in order])
    logical = physical.permute([order.index(axis) for axis in "LBHNC"])
    return {name: logical[i] for i, name in enumerate("abc")}


@pytest.mark.parametrize("order", ORDERS)
def test_every_number_is_where_the_geometry_says(order: str) -> None:
    found = caches(order)
    (g,) = geometries(found, NAMES, [Group(FullAttentionSpec(8, 4))], "FLASH_ATTN", Shard(1, 2, 4))
    assert (g.first_head, g.model_heads, g.layers, g.parts) == (2, 4, 3, (8, 4))
    wanted = vllm_cache(
        order, layers=3, blocks=5, heads=2, block_tokens=4, parts=(8, 4), first_head=2, total_heads=4, total_layers=3
    )
    assert g == wanted
    data = storage_bytes(found["a"]).view(torch.int16)
    for name, tensor in found.items():
        start = (tensor.data_ptr() - data.data_ptr()) // 2
        for part, (lo, hi) in enumerate(((0, 8), (8, 12))):
            block, head, token, dim = np.ogrid[0:5, 0:2, 0:4, 0 : hi - lo]
            at = start + part_maps(g)[part].element(block, head, token, dim)
            assert np.array_equal(data.numpy()[at], tensor.view(torch.int16).numpy()[..., lo:hi]), name


@pytest.mark.parametrize(
    ("spec", "interior"),
    [
        (FullAttentionSpec(8, 4), "CPU_ATTN/neon"),
        (FullAttentionSpec(8, 4), "TURBOQUANT"),
        (FullAttentionSpec(8, 4), ""),
        (FullAttentionSpec(8, 2), "FLASH_ATTN"),
        (MLAAttentionSpec(10), "FLASHMLA"),
        (FullAttentionSpec(8, 4), "CPU_ATTN/amx"),
    ],
    ids=["packing", "quantized", "none", "inline-scales", "mla-scales", "impossible"],
)
def test_what_is_not_known_has_no_geometry(spec: FullAttentionSpec | MLAAttentionSpec, interior: str) -> None:
    assert geometries(caches("LBHNC"), NAMES, [Group(spec)], interior, Shard(0, 1, 2)) == ()


def test_a_latent_is_one_part_that_all_ranks_hold() -> None:
    tensors = {name: tensor[:, :1] for name, tensor in caches("LBHNC").items()}
    (g,) = geometries(tensors, NAMES, [Group(MLAAttentionSpec(12))], "CPU_MLA", Shard(3, 4, 1))
    assert g.parts == (12,) and (g.first_head, g.model_heads) == (0, 1)


@pytest.mark.parametrize(
    ("ranks", "total", "heads", "first"),
    [(2, 8, 4, [0, 4]), (4, 2, 1, [0, 0, 1, 1]), (8, 2, 1, [0, 0, 0, 0, 1, 1, 1, 1]), (1, 5, 5, [0])],
)
def test_heads_of_ranks(ranks: int, total: int, heads: int, first: list[int]) -> None:
    assert [Shard(rank, ranks, total).first_head(heads) for rank in range(ranks)] == first


# --- two engines ---


def card(role: str, tp: int, tokens: int = 16, dtype: str = "bfloat16", **more: bool) -> wire.EngineCard:
    workers = []
    for rank in range(tp):
        g: Geometry = vllm_cache(
            "LBHNC",
            layers=2,
            blocks=8,
            heads=4 // tp,
            block_tokens=tokens,
            parts=(8, 8),
            dtype=dtype,
            first_head=rank * (4 // tp),
            total_heads=4,
        )
        block_bytes = g.strides[1] * g.width
        layers = (wire.LayerCard(4096, block_bytes, block_bytes, 8, 0),) * 2
        workers.append(wire.WorkerCard(Rank(rank), "", "tcp", b"", "DRAM", layers, 0, 0, (g,), 1, 4, 1 << 20))
    layout = {"tp": str(tp), "block_tokens": str(tokens)}
    name, incarnation = EngineName(role), Incarnation(role)
    return wire.EngineCard(
        name, incarnation, "tcp://h:1", role, {"dtype": dtype}, layout, (tokens,), tuple(workers), **more
    )


def test_equal_engines_meet_rank_by_rank() -> None:
    ours, theirs = card("prefill", 2), card("decode", 2)
    compare(ours, theirs)
    met = meeting(ours, theirs, Rank(1))
    assert met.direct and met.ranks == [1]


def test_one_prefill_rank_sends_to_two_decode_ranks() -> None:
    prefill, decode = card("prefill", 1), card("decode", 2, tokens=64)
    compare(prefill, decode)
    assert meeting(prefill, decode, Rank(0)).sends == {0: ((0, 2),), 1: ((2, 4),)}
    assert meeting(decode, prefill, Rank(1)).receives == {0: ((2, 4),)}
    assert meeting(decode, prefill, Rank(1)).sends == {}


def test_another_dtype_is_never_copied_verbatim() -> None:
    """Of the same width and layout: equal in everything that direct mode compares."""
    prefill, decode = card("prefill", 1, dtype="float16"), card("decode", 1, convert_dtype=True)
    compare(prefill, decode)
    assert not is_direct(prefill, decode)
    with pytest.raises(CompatError, match="'dtype'"):
        compare(card("prefill", 1, dtype="float16"), card("decode", 1))
    with pytest.raises(CompatError, match="'dtype'"):
        compare(card("prefill", 1, dtype="float16", convert_dtype=True), card("decode", 1))
