"""The geometry of this rank's caches, as found in vLLM's tensors and specs; none where the interior is not known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lmkv.errors import LayoutError
from lmkv.layout import WIDTHS, Geometry, check

_PACKED = {"CPU_ATTN/vec": "vec", "CPU_ATTN/vec16": "vec16", "CPU_ATTN/amx": "amx"}
_PLAIN = {
    "FLASH_ATTN",
    "FLASHINFER",
    "TRITON_ATTN",
    "FLEX_ATTENTION",
    "ROCM_ATTN",
    "ROCM_AITER_UNIFIED_ATTN",
    "CPU_MLA",
    "FLASHMLA",
    "CUTLASS_MLA",
    "FLASH_ATTN_MLA",
    "FLASHINFER_MLA",
    "TRITON_MLA",
}
"""Attention back ends whose blocks hold K and V (or the latent) of a token side by side."""


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's place in the model."""

    rank: int
    ranks: int
    model_heads: int
    """KV heads of the whole model; 1 for MLA."""

    def first_head(self, heads: int) -> int:
        """Ranks split the heads; with fewer heads than ranks, neighbours hold the same one."""
        return (
            self.rank * heads if heads * self.ranks <= self.model_heads else self.rank * self.model_heads // self.ranks
        )


def geometries(
    kv_caches: dict[str, Any], layer_names: tuple[tuple[str, ...], ...], groups: Any, interior: str, shard: Shard
) -> tuple[Geometry, ...]:
    """By transfer group; empty when a group is not one whose numbers lmkv can find (direct mode works all the same).

    `kv_caches`: [kernel blocks, heads, tokens, content] a layer. Strides come from the tensors.
    """
    kind = _PACKED.get(interior, "plain" if interior in _PLAIN else "")
    found = []
    for names, group in zip(layer_names, groups, strict=True):
        tensors = [kv_caches[name] for name in names]
        geometry = _geometry(tensors, group.kv_cache_spec, kind, shard) if kind and tensors else None
        if geometry is None:
            return ()
        found.append(geometry)
    return tuple(found)


def _geometry(tensors: list[Any], spec: Any, interior: str, shard: Shard) -> Geometry | None:
    first = tensors[0]
    alike = all(t.shape == first.shape and t.stride() == first.stride() and t.dtype == first.dtype for t in tensors)
    one_storage = len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    parts = _parts(spec, int(first.shape[3]))
    dtype = str(first.dtype).removeprefix("torch.")
    if not alike or not one_storage or parts is None or dtype not in WIDTHS:
        return None
    blocks, heads, tokens, _ = (int(n) for n in first.shape)
    block, head, token, content = (int(n) for n in first.stride())
    layer = (tensors[1].data_ptr() - first.data_ptr()) // first.element_size() if len(tensors) > 1 else 0
    model_heads = 1 if len(parts) == 1 else shard.model_heads
    geometry = Geometry(
        len(tensors),
        blocks,
        heads,
        tokens,
        parts,
        (max(0, layer), block, head, token),
        interior,
        dtype,
        first_layer=0,
        first_head=0 if len(parts) == 1 else shard.first_head(heads),
        total_layers=len(tensors),
        total_heads=model_heads,
    )
    try:
        check(geometry)
    except LayoutError:
        return None
    return geometry if content == 1 else None


def _parts(spec: Any, content: int) -> tuple[int, ...] | None:
    """K and V of a token, or one latent; None when there is more in it (inline scales)."""
    if "MLA" in type(spec).__name__:
        return (content,) if content == spec.head_size else None
    sizes = (int(spec.head_size), int(spec.head_size_v))
    return sizes if sum(sizes) == content else None


def storage_bytes(tensor: Any) -> torch.Tensor:
    """The whole storage behind a tensor as one row of bytes, sharing its memory."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
