"""vLLM configurations of simulated engines. The first of a process takes 0.6 s; the others are copies of it."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor

from .values import ModelShape

SHAPE = ModelShape()
MAX_TOKENS = 2048
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class EngineKind:
    """How one engine is set up."""

    role: str = "kv_producer"
    block_tokens: int = 16
    blocks: int = 64
    ranks: int = 1
    is_async: bool = False
    is_v2: bool = False
    step_tokens: int = 256
    most_requests: int = 16
    dtype: str = "bfloat16"
    chunk_limit: int = 0
    """Most tokens of one prompt in a step, so that long prompts let others pass; 0: as many as a step has."""
    overcommits: bool = False
    """A prompt is admitted when its first chunk fits in the cache, not only when all of it does."""


MODEL = Path(__file__).parent / "model"
"""A model that nobody computes: a configuration of `SHAPE`, and a file for the digest of its weights. It lies in the
repository because weights that are newer than their engine are shared with nobody."""


@functools.cache
def _base_config() -> Any:
    init_none_hash(sha256)
    args = EngineArgs(
        model=str(MODEL),
        skip_tokenizer_init=True,
        max_model_len=MAX_TOKENS,
        enforce_eager=True,
        block_size=16,
        enable_prefix_caching=True,
    )
    return args.create_engine_config()


def vllm_config(kind: EngineKind, extra: dict[str, Any]) -> Any:
    """`extra`: settings of the connector."""
    config = copy.deepcopy(_base_config())
    config.cache_config.block_size = kind.block_tokens
    config.cache_config.num_gpu_blocks = kind.blocks
    config.scheduler_config.max_num_batched_tokens = kind.step_tokens
    config.scheduler_config.max_num_seqs = kind.most_requests
    # CPUs force it off; defer_block_free and the second batch in flight hang on it.
    config.scheduler_config.async_scheduling = kind.is_async
    config.scheduler_config.long_prefill_token_threshold = kind.chunk_limit
    config.scheduler_config.scheduler_reserve_full_isl = not kind.overcommits
    config.parallel_config.tensor_parallel_size = kind.ranks
    config.model_config.dtype = DTYPES[kind.dtype]
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="SimConnector",
        kv_connector_module_path="tests.simulation.connector",
        kv_role=kind.role,
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=extra,
    )
    return config


def cache_config(kind: EngineKind) -> KVCacheConfig:
    heads = SHAPE.heads // kind.ranks
    spec = FullAttentionSpec(
        block_size=kind.block_tokens, num_kv_heads=heads, head_size=SHAPE.content // 2, dtype=DTYPES[kind.dtype]
    )
    names = layer_names()
    layer_bytes = spec.page_size_bytes * kind.blocks
    tensors = [KVCacheTensor(layer_bytes * len(names), names, layer_bytes, spec.page_size_bytes)]
    return KVCacheConfig(kind.blocks, tensors, [KVCacheGroupSpec(names, spec)], kv_cache_layout="LBHNC")


def layer_names() -> list[str]:
    return [f"model.layers.{i}.self_attn.attn" for i in range(SHAPE.layers)]
