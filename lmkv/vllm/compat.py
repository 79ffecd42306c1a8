"""Where lmkv touches vLLM's internals: one place to adapt when they move."""

from __future__ import annotations

import logging
from typing import Any

import vllm
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from lmkv.errors import ConfigError
from lmkv.ids import Rank

from .geometry import Shard

SUPPORTED = "0.32"


def check_version() -> None:
    """Raises ConfigError for a vLLM whose connector interface is not the one we were written for."""
    if not vllm.__version__.startswith(SUPPORTED + "."):
        raise ConfigError(
            f"this lmkv is for vLLM {SUPPORTED}.x, found {vllm.__version__}", hint=f"pip install 'vllm=={SUPPORTED}.*'"
        )


def tensor_rank() -> Rank:
    return Rank(get_tensor_model_parallel_rank())


def interior_of(vllm_config: Any, kv_caches: dict[str, Any]) -> str:
    """How the attention back end lays out the inside of a block: its name, and on CPUs the instruction set."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, list(kv_caches))
    kinds = set()
    for layer in layers.values():
        back_end = layer.get_attn_backend().get_name()
        isa = getattr(layer, "isa", "")
        kinds.add(f"{back_end}/{isa}" if isa else back_end)
    return ",".join(sorted(kinds))


class ResetWatch:
    """Tells whether vLLM has reset its prefix cache: `BlockPool.reset_prefix_cache` puts a new map in the place of the
    old one, whoever asked for it. Engine thread only."""

    def __init__(self, block_pool: Any) -> None:
        self._pool = block_pool
        self._map = block_pool.cached_block_hash_to_block

    def was_reset(self) -> bool:
        """Since the last call (or the beginning)."""
        before, self._map = self._map, self._pool.cached_block_hash_to_block
        return self._map is not before


def shard(vllm_config: Any) -> Shard:
    """This rank's place among the tensor-parallel ranks."""
    model = vllm_config.model_config
    return Shard(
        get_tensor_model_parallel_rank(),
        vllm_config.parallel_config.tensor_parallel_size,
        1 if model.use_mla else model.get_total_num_kv_heads(),
    )


def set_up_logging(level: str) -> None:
    """Our loggers speak through vLLM's handler."""
    ours, theirs = logging.getLogger("lmkv"), logging.getLogger("vllm")
    ours.setLevel(level.upper())
    ours.propagate = False
    if not ours.handlers:
        for handler in theirs.handlers:
            ours.addHandler(handler)
