"""What lmkv does not support yet: refused by name when an engine starts, before it could exchange wrong KV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lmkv.errors import ConfigError

_PER_TOKEN = {"FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec", "ChunkedLocalAttentionSpec"}
"""vLLM's specs of caches that hold, in each block, the KV of the block's tokens and nothing else."""
_STATES = "a state is not made of tokens: a block of it cannot be sent or stored on its own"


def refuse_settings(vllm_config: Any) -> None:
    """Raise ConfigError for an option of vLLM that lmkv cannot work with, naming it, its value and the way out."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for name, option in (
        ("pipeline_parallel_size", "--pipeline-parallel-size"),
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        size = getattr(parallel, name)
        if size > 1:
            raise _refused(f"{name}={size}", f"leave out {option}; use --tensor-parallel-size instead")
    if parallel.enable_dbo or parallel.ubatch_size > 1:
        raise _refused(
            f"dual batch overlap (enable_dbo={parallel.enable_dbo}, ubatch_size={parallel.ubatch_size})",
            "leave out --enable-dbo and --ubatch-size: layers are computed twice a step there, and the first time "
            "would be taken for the whole",
        )
    if model.enable_sleep_mode:
        raise _refused(
            "enable_sleep_mode=True",
            "leave out --enable-sleep-mode: a sleeping engine gives back memory that is registered for transfers",
        )


def refuse_caches(kv_cache_config: Any) -> None:
    """Raise ConfigError for KV cache groups that lmkv cannot move: states, unequal pages, unknown kinds."""
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        where = f"KV cache group {index} ({', '.join(group.layer_names[:2])}, …)"
        for spec in layer_specs(group.kv_cache_spec):
            refuse_spec(spec, where)
        if group.host_resident or not group.enable_kv_transfer:
            raise _refused(f"{where} is not part of vLLM's KV transfer", "leave out --attention-config.hisparse_config")
    pages = sorted({spec.page_size_bytes for spec in _specs(kv_cache_config.transfer_groups)})
    if len(pages) > 1:
        raise _refused(
            f"KV cache pages of unequal size ({', '.join(map(str, pages))} bytes)",
            "serve a model (and a drafter) whose layers all have pages of one size, or start without lmkv",
        )


def refuse_spec(spec: Any, where: str) -> None:
    """Raise ConfigError unless blocks of this spec hold the KV of their tokens, token by token."""
    kinds = [kind.__name__ for kind in type(spec).__mro__]
    if "MambaSpec" in kinds:
        kind = getattr(spec, "mamba_type", "")
        raise _refused(
            f"{where} is of kind MambaSpec ({getattr(kind, 'name', kind)}), a Mamba or linear attention state",
            f"serve a model with attention in all layers, or start without lmkv: {_STATES}",
        )
    if kinds[0] not in _PER_TOKEN:
        raise _refused(f"{where} is of kind {kinds[0]}", "start without lmkv: it does not know such caches")
    per_state = getattr(spec, "tokens_per_state", 1)
    if per_state != 1:
        raise _refused(
            f"{where} has tokens_per_state={per_state}", f"start without lmkv: the cache is compressed, and {_STATES}"
        )


def layer_specs(spec: Any) -> Iterable[Any]:
    """The specs of a group's layers: one for all, or one each (UniformTypeKVCacheSpecs)."""
    each = getattr(spec, "kv_cache_specs", None)
    return (spec,) if each is None else each.values()


def _specs(groups: Iterable[Any]) -> Iterator[Any]:
    for group in groups:
        yield from layer_specs(group.kv_cache_spec)


def _refused(what: str, hint: str) -> ConfigError:
    return ConfigError(f"lmkv does not support {what}", hint=hint, code="LMKV-C120")
