"""What of vLLM's configuration decides the numbers in the KV cache.

Each `Field` is one entry of `must`: engines that differ in it neither pair nor share pages. What changes only how fast
the numbers come, in which order they are summed up, or where they lie in memory, is no field (docs/fingerprint.md).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

_VOLATILE = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}
_ROPE_OF_CONFIG = {
    *("default", "linear", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"),
    *("proportional", "mllama4", "mrope", "bailing_mrope", "openpangu"),
}
"""Kinds of rope whose angles follow from the model's configuration alone."""


MULTIMODAL = (
    *("language_model_only", "mm_encoder_only", "media_io_kwargs", "mm_processor_kwargs"),
    *("mm_device_do_normalize", "mm_encoder_attn_dtype", "video_pruning_rate", "video_pruning_method"),
)
"""vLLM's multimodal settings that change what an image becomes."""


_CONTENT_HASH = re.compile(r"(?:.*:)?(?:[0-9a-f]{64}|[0-9a-f]{128})", re.DOTALL)


def is_content_hash(identifier: str) -> bool:
    """vLLM's own identifier of an image, video or audio: a hash of its content (after an adapter's name, where the
    encoder has adapters). Clients may give others instead, and two of them the same one for different content."""
    return _CONTENT_HASH.fullmatch(identifier) is not None


def digest(value: object) -> str:
    """16 hex digits over the canonical JSON of a value, the same in every process (`plain`)."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def plain(value: object) -> object:
    """`value` as JSON knows it. Objects are told by their type and fields, never by an address in memory."""
    if value is None or isinstance(value, bool | int | float | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(plain(item), sort_keys=True) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return [type(value).__qualname__, {name: plain(getattr(value, name)) for name in names}]
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    text = str(value)
    return f"{type(value).__qualname__}" if " at 0x" in text else text


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest of a Hugging Face config without the entries that do not change the KV, at any depth."""
    return digest(_lasting(config))


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    """Only models' own configs are cleaned: elsewhere (quantization) a dtype is a fact."""
    return {
        key: _lasting(value) if isinstance(value, Mapping) and "model_type" in value else value
        for key, value in config.items()
        if key not in _VOLATILE
    }


def _model(config: Any) -> str:
    model = config.model_config
    whole, text = config_digest(model.hf_config.to_dict()), config_digest(model.hf_text_config.to_dict())
    return ",".join(model.architectures or ["?"]) + ":" + (whole if whole == text else digest([whole, text]))


def _implementation(config: Any) -> str:
    model = config.model_config
    kind = "transformers" if model.using_transformers_backend() else "vllm"
    return f"{kind}:{digest(model.model_class_overrides)}" if model.model_class_overrides else kind


def _rope(config: Any) -> str:
    """Where the angles, or the attention scale, depend on max_model_len too: which ones this engine uses."""
    model, found = config.model_config, set()
    text = model.hf_text_config.to_dict()
    for rope in _ropes(text):
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "longrope":
            original = rope.get("original_max_position_embeddings", text.get("original_max_position_embeddings"))
            # vLLM takes one of the two sets for all positions (Phi3LongRoPEScaledRotaryEmbedding).
            chosen = "long" if original is None or model.max_model_len > original else "short"
            found.add(f"longrope:{chosen}" if original is not None else f"longrope:{model.max_model_len}")
        elif kind not in _ROPE_OF_CONFIG:
            found.add(f"{kind}:{model.max_model_len}")
    if any(name.startswith("Llama4") for name in model.architectures or ()):
        # vLLM tunes the attention temperature by default when contexts may be this long.
        given = {**model.try_get_generation_config(), **model.override_generation_config}
        found.add(f"tuned:{given.get('attn_temperature_tuning', model.max_model_len > 32768)}")
    return ",".join(sorted(found)) or "model"


def _ropes(value: object) -> Iterator[Mapping[str, Any]]:
    """Every dictionary at any depth that names a kind of rope."""
    if isinstance(value, Mapping):
        if isinstance(value.get("rope_type", value.get("type")), str) and ("rope_type" in value or "factor" in value):
            yield value
        for item in value.values():
            yield from _ropes(item)


def _kv_quantization(config: Any) -> str:
    cache = config.cache_config
    scales = bool(getattr(cache, "calculate_kv_scales", False))
    skipped = sorted(map(str, cache.kv_cache_dtype_skip_layers))
    return digest([scales, skipped]) if scales or skipped else "none"


def _quantization(config: Any) -> str:
    model = config.model_config
    settings = model.quantization_config
    return f"{model.quantization}:{digest(settings)}" if settings is not None else str(model.quantization)


def _load(config: Any) -> str:
    load, harmless = config.load_config, {"enable_multithread_load", "num_threads", "enable_weights_track"}
    extra = load.model_loader_extra_config
    extra = {k: v for k, v in extra.items() if k not in harmless} if isinstance(extra, Mapping) else extra
    ignored = list(load.ignore_patterns) != ["original/**/*"]
    more = [extra, load.ignore_patterns] if extra or ignored else None
    return f"{load.load_format}:{digest(more)}" if more else str(load.load_format)


def _attention(config: Any) -> str:
    model, cache, attention = config.model_config, config.cache_config, config.attention_config
    return digest(
        {
            "disable_sliding_window": model.disable_sliding_window,
            "sliding_window": cache.sliding_window,
            "attention_chunk_size": model.attention_chunk_size,
            "kv_sharing_fast_prefill": cache.kv_sharing_fast_prefill,
            "swa_bounded_replay": cache.swa_bounded_replay,
            "use_non_causal": attention.use_non_causal,
            "indexer_kv_dtype": attention.indexer_kv_dtype,
            "indexer_sparse_logits": attention.indexer_sparse_logits,
            "use_prefill_query_quantization": attention.use_prefill_query_quantization,
        }
    )


def _context_parallel(config: Any) -> str:
    parallel = config.parallel_config
    return f"{parallel.decode_context_parallel_size}x{parallel.prefill_context_parallel_size}"


def _multimodal(config: Any) -> str:
    settings = config.model_config.multimodal_config
    if settings is None:
        return "none"
    scales = settings.mm_encoder_fp8_scale_path
    try:
        content = Path(scales).read_text() if scales else ""
    except (OSError, ValueError) as error:
        content = f"{scales}: {error}"
    return digest([content, {name: getattr(settings, name) for name in MULTIMODAL}])


def _speculative(config: Any) -> str:
    """Only a drafter with KV of its own counts; its weights are part of `weights`."""
    speculative = config.speculative_config
    if speculative is None or not speculative.uses_draft_kv_cache():
        return "none"
    draft = speculative.draft_model_config
    parts = [
        config_digest(draft.hf_config.to_dict()) if draft is not None else None,
        draft.quantization if draft is not None else None,
        speculative.parallel_drafting,
        str(speculative.kv_cache_dtype or config.cache_config.cache_dtype),
    ]
    return f"{speculative.method}:{digest(parts)}"


def _plugins(config: Any) -> str:
    more = [config.additional_config or None, config.diffusion_config, config.engram_config]
    return digest(more) if any(part is not None for part in more) else "none"


def lora_settings(config: Any) -> str:
    """What of vLLM's LoRA settings changes the KV of requests with an adapter: part of their names, not of `must`."""
    lora = config.lora_config
    if lora is None:
        return ""
    targets = sorted(lora.target_modules) if lora.target_modules is not None else None
    flags = [lora.enable_tower_connector_lora, lora.enable_mixed_moe_lora_format, lora.enable_moe_shared_loras]
    return digest([str(lora.lora_dtype), targets, flags])


@dataclass(frozen=True, slots=True)
class Field:
    """One entry of `must`. `settings` names what decides it, `hint` what to do where two engines differ."""

    name: str
    read: Callable[[Any], str]
    settings: str
    hint: str


FIELDS = (
    Field(
        "model",
        _model,
        "architecture and the whole Hugging Face config, `--hf-overrides` and `rope_parameters` included",
        "both engines must serve the same model; compare --model and --hf-overrides on both",
    ),
    Field(
        "implementation",
        _implementation,
        "`--model-impl` (vLLM's own code or that of transformers), `model_class_overrides`",
        "start both with the same --model-impl",
    ),
    Field(
        "dtype",
        lambda config: str(config.model_config.dtype),
        "`--dtype`",
        "start both with the same --dtype, or let decode convert it (convert_dtype)",
    ),
    Field(
        "kv_dtype",
        lambda config: str(config.cache_config.cache_dtype),
        "`--kv-cache-dtype`",
        "start both with the same --kv-cache-dtype",
    ),
    Field(
        "kv_quantization",
        _kv_quantization,
        "`--kv-cache-dtype-skip-layers`, `calculate_kv_scales` (scales in the checkpoint are part of `weights`)",
        "start both with the same --kv-cache-dtype-skip-layers",
    ),
    Field(
        "quantization",
        _quantization,
        "`--quantization` and the content of its configuration (that of the checkpoint is in `model` and `weights`)",
        "start both with the same --quantization",
    ),
    Field(
        "load",
        _load,
        "`--load-format`, `--ignore-patterns`, `--model-loader-extra-config`: which of a folder's files are loaded",
        "start both with the same --load-format",
    ),
    Field(
        "rope",
        _rope,
        "`--max-model-len`, but only where it chooses between angles (LongRoPE: whether it exceeds the original "
        "length, dynamic and NTK: the number) or the attention scale (Llama 4: whether it exceeds 32,768)",
        "start both with the same --max-model-len: this model's rope depends on it",
    ),
    Field(
        "attention",
        _attention,
        "`--disable-sliding-window`, sliding window, attention chunks, `--kv-sharing-fast-prefill`, bounded replay, "
        "non-causal attention, the indexer's dtype and logits, query quantization",
        "start both with the same --disable-sliding-window and --attention-config",
    ),
    Field(
        "context_parallel",
        _context_parallel,
        "decode and prefill context parallelism (more than 1 is refused at the start)",
        "start both with the same --decode-context-parallel-size and --prefill-context-parallel-size",
    ),
    Field(
        "multimodal",
        _multimodal,
        "processor and media arguments, encoder dtype and its scales' content, video pruning, `--language-model-only`",
        "start both with the same --mm-processor-kwargs, --media-io-kwargs and encoder settings",
    ),
    Field(
        "speculative",
        _speculative,
        "a drafter with KV of its own: method, its config, quantization, KV dtype; drafters without KV do not count",
        "start both with the same --speculative-config",
    ),
    Field(
        "plugins",
        _plugins,
        "`--additional-config`, diffusion and engram settings",
        "start both with the same --additional-config",
    ),
    Field("layers", lambda config: str(config.model_config.get_total_num_hidden_layers()), "the model", ""),
    Field("kv_heads", lambda config: str(config.model_config.get_total_num_kv_heads()), "the model", ""),
    Field("head_size", lambda config: str(config.model_config.get_head_size()), "the model", ""),
)
