"""What tests take from vLLM itself. Its import warns of things that are not ours, and takes several seconds."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm import SamplingParams
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.v1 import kv_cache_interface
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

    from lmkv.vllm.connector import LmkvConnector
    from lmkv.vllm.metadata import HandshakeMeta
    from lmkv.vllm.scheduler import SchedulerSide

__all__ = [
    "BlockPool",
    "EngineArgs",
    "HandshakeMeta",
    "KVConnectorRole",
    "LmkvConnector",
    "LoRARequest",
    "Request",
    "SamplingParams",
    "SchedulerSide",
    "VllmConfig",
    "get_rope",
    "kv_cache_interface",
    "set_current_vllm_config",
]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def model_folder(path: Path, **more: Any) -> Path:
    """A Llama's config in the folder `path`, without weights and tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(LLAMA | more))
    return path


def vllm_config(model: Path, **more: Any) -> VllmConfig:
    """vLLM's whole configuration, as its engine makes it, for a folder of `model_folder`."""
    given = {"max_model_len": 256, "enforce_eager": True, "skip_tokenizer_init": True, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EngineArgs(model=str(model), **given).create_engine_config()
