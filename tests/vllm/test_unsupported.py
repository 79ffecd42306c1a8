"""What lmkv does not support is refused by name, with vLLM's own specs and configurations."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmkv.errors import ConfigError
from lmkv.vllm import memory
from lmkv.vllm.geometry import Shard
from lmkv.vllm.unsupported import refuse_caches, refuse_settings

from .real_vllm import KVConnectorRole, LmkvConnector, kv_cache_interface, model_folder, vllm_config

pytestmark = pytest.mark.timeout(600)  # importing vLLM and its first configuration may take a minute and more

SPECS = kv_cache_interface
FULL: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}


def full(**more: Any) -> Any:
    return SPECS.FullAttentionSpec(**(FULL | more))


def mamba() -> Any:
    return SPECS.MambaSpec(block_size=16, shapes=((2, 32), (4, 8)), dtypes=(torch.float32, torch.float32))


def caches(*specs: Any, **group: Any) -> Any:
    groups = [SPECS.KVCacheGroupSpec([f"layer.{i}", f"layer.{i}b"], spec, **group) for i, spec in enumerate(specs)]
    return SPECS.KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.mark.parametrize(
    "specs",
    [
        [full()],
        [full(), SPECS.SlidingWindowSpec(sliding_window=64, **FULL)],
        [SPECS.MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)],
        [SPECS.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": full(), "b": full()})],
    ],
)
def test_attention_with_equal_pages_is_taken(specs: list[Any]) -> None:
    refuse_caches(caches(*specs))


@pytest.mark.parametrize(
    ("specs", "named"),
    [
        ([mamba()], "MambaSpec .MAMBA2., a Mamba or linear attention state"),
        ([full(), mamba()], "KV cache group 1 .layer.1, layer.1b.* MambaSpec"),
        (
            [SPECS.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": mamba()})],
            "MambaSpec",
        ),
        ([full(), full(head_size=64)], "pages of unequal size .8192, 16384 bytes."),
        (
            [SPECS.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": full(), "b": full(num_kv_heads=4)})],
            "pages of unequal size",
        ),
        ([SPECS.CrossAttentionSpec(**FULL)], "CrossAttentionSpec"),
        ([SPECS.CircularBufferSpec(**FULL)], "CircularBufferSpec"),
        ([full(tokens_per_state=4)], "tokens_per_state=4"),
        ([full(tokens_per_state=Fraction(1, 2))], "tokens_per_state=1/2"),
    ],
)
def test_caches_are_refused_by_name(specs: list[Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        refuse_caches(caches(*specs))
    assert caught.value.hint and caught.value.code == "LMKV-C120"


def test_groups_outside_of_vllms_transfer_are_refused() -> None:
    with pytest.raises(ConfigError, match="not part of vLLM's KV transfer"):
        refuse_caches(caches(full(), enable_kv_transfer=False))


def test_a_mamba_page_of_four_dimensions_is_no_attention_cache() -> None:
    """vLLM passes states as [blocks, 1, 1, bytes]: the shape alone does not tell."""
    pages = torch.zeros(8, 1, 1, 384, dtype=torch.int8)
    config = caches(mamba())
    with pytest.raises(ConfigError, match="MambaSpec"):
        memory.describe({"layer.0": pages, "layer.0b": pages}, config, "FLASH_ATTN", Shard(0, 1, 2))


def settings(**more: Any) -> Any:
    parallel = {
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "enable_dbo": False,
        "ubatch_size": 0,
    }
    given = {key: value for key, value in more.items() if key in parallel}
    sleep = more.get("enable_sleep_mode", False)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**(parallel | given)), model_config=SimpleNamespace(enable_sleep_mode=sleep)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pipeline_parallel_size", 2),
        ("decode_context_parallel_size", 2),
        ("prefill_context_parallel_size", 4),
        ("enable_dbo", True),
        ("ubatch_size", 2),
        ("enable_sleep_mode", True),
    ],
)
def test_options_are_refused_by_name(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value}") as caught:
        refuse_settings(settings(**{name: value}))
    assert "leave out" in caught.value.hint


def test_the_connector_refuses_before_it_does_anything(tmp_path: Path) -> None:
    """With vLLM's whole configuration, in both of its processes; all names are vLLM's own."""
    config = vllm_config(model_folder(tmp_path))
    refuse_settings(config)
    for role in (KVConnectorRole.SCHEDULER, KVConnectorRole.WORKER):
        with pytest.raises(ConfigError, match="MambaSpec"):
            LmkvConnector(_with_transfer(config), role, caches(mamba()))
    object.__setattr__(config.parallel_config, "decode_context_parallel_size", 2)
    with pytest.raises(ConfigError, match="decode_context_parallel_size=2"):
        LmkvConnector(_with_transfer(config), KVConnectorRole.SCHEDULER, caches(full()))


def _with_transfer(config: Any) -> Any:
    object.__setattr__(config, "kv_transfer_config", SimpleNamespace(kv_role="kv_both", kv_connector_extra_config={}))
    return config
