"""What changes the numbers in the cache changes the fingerprint, asked with vLLM's own configurations."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmkv.vllm.contents import FIELDS, MULTIMODAL, config_digest, digest
from lmkv.vllm.fingerprint import must_match

from .real_vllm import VllmConfig, get_rope, model_folder, set_current_vllm_config, vllm_config

pytestmark = pytest.mark.timeout(600)  # importing vLLM and its first configuration may take a minute and more

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    return vllm_config(model_folder(tmp_path_factory.mktemp("plain")))


def must(config: Any) -> dict[str, str]:
    return must_match(config, "0.32.0")


def differing(one: Any, other: Any) -> set[str]:
    first, second = must(one), must(other)
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


def test_the_same_model_elsewhere_has_the_same_fingerprint(plain: VllmConfig, tmp_path: Path) -> None:
    assert differing(plain, vllm_config(model_folder(tmp_path / "moved"))) == set()


def test_what_does_not_change_the_numbers_is_no_difference(plain: VllmConfig, tmp_path: Path) -> None:
    other = vllm_config(
        model_folder(tmp_path),
        max_model_len=8192,
        max_num_seqs=3,
        seed=7,
        block_size=32,
        gpu_memory_utilization=0.3,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
    )
    assert differing(plain, other) == set()


@pytest.mark.parametrize(
    ("field", "folder", "given"),
    [
        ("model", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}),
        ("model", {}, {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}}),
        ("model", {"rms_norm_eps": 0.1}, {}),
        ("dtype", {}, {"dtype": "float32"}),
        ("load", {}, {"load_format": "pt"}),
        ("implementation", {}, {"model_impl": "transformers"}),
        ("plugins", {}, {"additional_config": {"x": 1}}),
    ],
)
def test_options_that_change_the_numbers(
    plain: VllmConfig, tmp_path: Path, field: str, folder: dict[str, Any], given: dict[str, Any]
) -> None:
    assert differing(plain, vllm_config(model_folder(tmp_path, **folder), **given)) == {field}


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        *parts, last = path.split(".")
        for part in parts:
            config = getattr(config, part)
        object.__setattr__(config, last, value)

    return change


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("kv_dtype", _set("cache_config.cache_dtype", "fp8_e4m3")),
        ("kv_quantization", _set("cache_config.kv_cache_dtype_skip_layers", ["0"])),
        ("kv_quantization", _set("cache_config.calculate_kv_scales", True)),
        ("quantization", _set("model_config.quantization", "fp8")),
        ("quantization", _set("model_config.quantization_config", {"ignore": ["lm_head"]})),
        ("attention", _set("model_config.disable_sliding_window", True)),
        ("attention", _set("model_config.attention_chunk_size", 128)),
        ("attention", _set("cache_config.sliding_window", 128)),
        ("attention", _set("cache_config.kv_sharing_fast_prefill", True)),
        ("attention", _set("attention_config.indexer_kv_dtype", "fp8")),
        ("context_parallel", _set("parallel_config.decode_context_parallel_size", 2)),
        ("context_parallel", _set("parallel_config.prefill_context_parallel_size", 2)),
        ("load", _set("load_config.ignore_patterns", ["x"])),
        ("load", _set("load_config.model_loader_extra_config", {"qlora_adapter_name_or_path": "x"})),
    ],
)
def test_settings_that_this_host_cannot_start_with(
    plain: VllmConfig, field: str, change: Callable[[Any], None]
) -> None:
    """Set on a real configuration, where vLLM on a CPU would refuse the option."""
    other = copy.copy(plain)
    for name in ("model_config", "cache_config", "parallel_config", "attention_config", "load_config"):
        object.__setattr__(other, name, copy.copy(getattr(plain, name)))
    change(other)
    assert differing(plain, other) == {field}


def test_multimodal_settings_count() -> None:
    names = (*MULTIMODAL, "mm_encoder_fp8_scale_path")
    (read,) = [field.read for field in FIELDS if field.name == "multimodal"]

    def config(**given: Any) -> Any:
        settings = SimpleNamespace(**(dict.fromkeys(names) | given))
        return SimpleNamespace(model_config=SimpleNamespace(multimodal_config=settings))

    found = {read(config())} | {read(config(**{name: "x"})) for name in names}
    assert len(found) == 1 + len(names)
    assert read(SimpleNamespace(model_config=SimpleNamespace(multimodal_config=None))) == "none"


@pytest.mark.parametrize("more", ["field", "config", "quantization", "parallel"])
def test_a_drafter_with_kv_counts_by_content(more: str) -> None:
    (read,) = [field.read for field in FIELDS if field.name == "speculative"]

    def config(changed: str) -> Any:
        hf_config = SimpleNamespace(to_dict=lambda: {"hidden_size": 8 if changed == "config" else 4})
        draft = SimpleNamespace(hf_config=hf_config, quantization="fp8" if changed == "quantization" else None)
        speculative = SimpleNamespace(
            uses_draft_kv_cache=lambda: True,
            method="eagle3" if changed == "field" else "eagle",
            draft_model_config=draft,
            parallel_drafting=changed == "parallel",
            kv_cache_dtype=None,
        )
        return SimpleNamespace(speculative_config=speculative, cache_config=SimpleNamespace(cache_dtype="auto"))

    assert read(config("")) == read(config("")) != read(config(more))


def rope_of(config: VllmConfig) -> torch.Tensor:
    """The angles that vLLM itself computes with for the first positions."""
    model = config.model_config
    with set_current_vllm_config(config):
        rope = get_rope(16, model.hf_text_config.max_position_embeddings, True, dict(LONGROPE), torch.float32)
    offset = 4096 if rope.use_long_rope else 0
    return rope.long_short_cos_sin_cache[offset : offset + 64]


def test_max_model_len_counts_where_it_chooses_the_rope(tmp_path: Path) -> None:
    """The fingerprint follows what vLLM's rope does: long factors for every position once contexts may be long."""
    from vllm.model_executor.layers import rotary_embedding

    folder = model_folder(tmp_path, rope_parameters=LONGROPE | {"rope_theta": 1e4}, max_position_embeddings=16384)
    angles, ropes = [], []
    for length in (2048, 4096, 4097, 8192):
        config = vllm_config(folder, max_model_len=length)
        rotary_embedding._ROPE_DICT.clear()
        angles.append(rope_of(config))
        ropes.append(must(config)["rope"])
    assert ropes == ["longrope:short", "longrope:short", "longrope:long", "longrope:long"]
    for i, one in enumerate(ropes):
        for j, other in enumerate(ropes):
            assert (one == other) == torch.equal(angles[i], angles[j])


@pytest.mark.parametrize("kind", ["dynamic", "ntk", "something new"])
def test_a_rope_that_is_not_known_to_be_fixed_counts_the_length(plain: VllmConfig, kind: str) -> None:
    def config(length: int) -> Any:
        text = SimpleNamespace(to_dict=lambda: {"rope_parameters": {"full": {"rope_type": kind, "factor": 2.0}}})
        model = SimpleNamespace(hf_text_config=text, architectures=["X"], max_model_len=length)
        return SimpleNamespace(model_config=model)

    (read,) = [field.read for field in FIELDS if field.name == "rope"]
    assert read(config(100)) != read(config(200))


def test_digests_do_not_depend_on_the_process() -> None:
    """An object's address is in its repr: it must not get in."""

    class Thing:
        pass

    class Kind(enum.Enum):
        ONE = 1

    @dataclasses.dataclass
    class Settings:
        dtype: torch.dtype
        kind: Kind

    for make in (Thing, lambda: Settings(torch.float16, Kind.ONE), lambda: {"f": Thing()}, lambda: {3, 1, 2}):
        assert digest(make()) == digest(make())
    assert digest(Settings(torch.float16, Kind.ONE)) != digest(Settings(torch.bfloat16, Kind.ONE))


def test_configs_are_cleaned_at_any_depth_but_quantization_is_not() -> None:
    vision = {"model_type": "v", "_name_or_path": "x", "dtype": "bf16", "size": 1}
    assert config_digest({"vision": vision}) == config_digest({"vision": vision | {"_name_or_path": "y"}})
    assert config_digest({"vision": vision}) != config_digest({"vision": vision | {"size": 2}})
    assert config_digest({"quantization_config": {"dtype": "int4"}}) != config_digest({"quantization_config": {}})
