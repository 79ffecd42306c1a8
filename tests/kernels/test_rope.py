"""Rotary frequencies, and keys moved from one position to another, against vLLM's own rotary modules."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lmkv.errors import LayoutError
from lmkv.kernels import Cache, rotate_keys
from lmkv.layout import vllm_cache
from lmkv.rope import from_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 512},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024},
}
HEAD_DIM, LONGEST = 128, 4096
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of one rounding."""


def config_of(kind: str, **more: Any) -> dict[str, Any]:
    return {"head_dim": HEAD_DIM, "max_position_embeddings": LONGEST, "rope_parameters": PARAMETERS[kind], **more}


@pytest.fixture(scope="module", autouse=True)
def vllm_config() -> Iterator[None]:
    """vLLM's modules want to be made within a configuration, and importing them warns of what they use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = pytest.importorskip("vllm.config")
        with config.set_current_vllm_config(config.VllmConfig()):
            yield


def module_of(kind: str, *, interleaved: bool = False, partial: float = 1.0, dtype: torch.dtype = torch.float32) -> Any:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    parameters = {**PARAMETERS[kind], "partial_rotary_factor": partial}
    return get_rope(HEAD_DIM, LONGEST, not interleaved, parameters, dtype)


@functools.cache
def raw_keys(dtype: torch.dtype) -> torch.Tensor:
    """(tokens, HEAD_DIM), before any turn."""
    return torch.randn(64, HEAD_DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def keys_at(module: Any, first: int, dtype: torch.dtype) -> torch.Tensor:
    """As the engine computes them for positions from `first` on."""
    keys = raw_keys(dtype).to(module.cos_sin_cache.dtype)
    turned = module.forward_native(torch.arange(first, first + len(keys)), torch.zeros_like(keys), keys)[1]
    return turned.to(dtype)


def moved(keys: torch.Tensor, offset: int, config: dict[str, Any], interleaved: bool) -> torch.Tensor:
    """By the op, in a cache of blocks of 16 tokens."""
    g = vllm_cache(
        "LBHNC",
        layers=1,
        blocks=4,
        heads=1,
        block_tokens=16,
        parts=(HEAD_DIM, HEAD_DIM),
        dtype=str(keys.dtype).removeprefix("torch."),
    )
    cache = Cache.empty(g)
    table = cache.data.view(keys.dtype).view(len(keys), 2, HEAD_DIM)
    table[:, 0] = keys
    runs = np.array([[block, 0, 16] for block in range(4)], dtype=np.int32)
    rotate_keys(cache, runs, offset, from_config(config, interleaved=interleaved))
    assert not table[:, 1].any(), "values were touched"
    return table[:, 0]


def pair_lengths(keys: torch.Tensor, interleaved: bool, dims: int = HEAD_DIM) -> torch.Tensor:
    """Of every number, the length of the pair that it belongs to; of those that are not turned, 0."""
    turned = keys[:, :dims].double()
    if interleaved:
        lengths = turned.unflatten(1, (-1, 2)).norm(dim=2).repeat_interleave(2, dim=1)
    else:
        lengths = turned.unflatten(1, (2, -1)).norm(dim=1).repeat(1, 2)
    return torch.nn.functional.pad(lengths, (0, keys.shape[1] - dims))


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("kind", PARAMETERS)
def test_frequencies_are_vllms(kind: str, partial: float) -> None:
    """Up to the last bits of float32, in which libraries' powers differ."""
    module = module_of(kind, partial=partial)
    with torch.no_grad():
        theirs = module._compute_inv_freq(PARAMETERS[kind]["factor"] if kind == "yarn" else module.base).numpy()
    if kind == "linear":
        theirs = theirs / np.float32(4)  # vLLM divides the positions
    ours = from_config(config_of(kind, partial_rotary_factor=partial)).frequencies
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=5e-7)


MOVES = [(0, 1), (0, 3000), (17, 900), (3900, 5), (2000, 2001)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", PARAMETERS)
def test_keys_moved_are_keys_computed_there_in_float32(kind: str, interleaved: bool) -> None:
    """What is left are the engine's angles: a position below 2^12 times a frequency, rounded to float32, is off by up
    to 2^-13 radians, at either place."""
    module = module_of(kind, interleaved=interleaved)
    for p, q in MOVES:
        got = moved(keys_at(module, p, torch.float32), q - p, config_of(kind), interleaved)
        wanted = keys_at(module, q, torch.float32)
        assert ((got - wanted).abs() <= 2.0**-11 * pair_lengths(wanted, interleaved)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", PARAMETERS)
def test_keys_moved_are_keys_computed_there_up_to_the_cache_s_rounding(
    kind: str, interleaved: bool, dtype: torch.dtype
) -> None:
    """The engine turns in float32 here. Three roundings to the cache's type are between the two: the key at p (which
    the turn spreads over a pair, hence √2), the moved key, and the key at q; u is the type's unit, r a pair's length:

    |moved − computed| ≤ (√2 + 2) · u · r, and the angles' 2^-11 · r as in float32
    """
    module = module_of(kind, interleaved=interleaved)
    for p, q in MOVES:
        got = moved(keys_at(module, p, dtype), q - p, config_of(kind), interleaved)
        wanted = keys_at(module, q, dtype)
        bound = ((2**0.5 + 2) * UNIT[dtype] + 2.0**-11) * pair_lengths(wanted, interleaved) * (1 + 4 * UNIT[dtype])
        assert ((got.double() - wanted.double()).abs() <= bound).all()


@pytest.mark.parametrize("kind", PARAMETERS)
def test_keys_moved_are_as_near_as_the_engine_s_own_rounding(kind: str) -> None:
    """An engine in bfloat16 rounds cosines, sines, products and sums too, 3 u r a number at either place, so that the
    bound is (3√2 + 1 + 3) · u · r. On the whole a moved key is no further from the exact one than twice what the
    engine's own is."""
    module, exact = module_of(kind, dtype=torch.bfloat16), module_of(kind)
    for p, q in MOVES:
        got = moved(keys_at(module, p, torch.bfloat16), q - p, config_of(kind), interleaved=False).double()
        theirs = keys_at(module, q, torch.bfloat16).double()
        truth = raw_keys(torch.bfloat16).float()
        truth = exact.forward_native(torch.arange(q, q + 64), torch.zeros_like(truth), truth)[1].double()
        bound = ((3 * 2**0.5 + 4) * 2.0**-8 + 2.0**-11) * pair_lengths(truth, interleaved=False) * (1 + 2.0**-5)
        assert ((got - theirs).abs() <= bound).all()
        assert (got - truth).norm() <= 2 * (theirs - truth).norm()


def test_partial_rotation_leaves_the_rest_alone() -> None:
    module = module_of("default", partial=0.5)
    keys = keys_at(module, 3, torch.float32)
    got = moved(keys, 97, config_of("default", partial_rotary_factor=0.5), interleaved=False)
    assert torch.equal(got[:, 64:], keys[:, 64:])
    assert torch.allclose(got, keys_at(module, 100, torch.float32), atol=1e-4)


def test_a_wrong_frequency_would_be_noticed() -> None:
    """The bounds above are not so wide that anything passes: one pair off by a percent does not."""
    module = module_of("default")
    config = config_of("default")
    config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": 505000.0}
    got = moved(keys_at(module, 0, torch.bfloat16), 3000, config, interleaved=False)
    wanted = keys_at(module, 3000, torch.bfloat16)
    bound = ((2**0.5 + 2) * 2.0**-8 + 2.0**-11) * pair_lengths(wanted, interleaved=False)
    assert not ((got.double() - wanted.double()).abs() <= bound).all()


def test_configs_of_old_and_of_common_models() -> None:
    old = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 8192, "rope_theta": 5e5}
    scaled = {**old, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 512}}
    config = {**config_of("llama3"), "model_type": "llama"}
    np.testing.assert_array_equal(from_config(scaled).frequencies, from_config(config).frequencies)
    legacy = {**old, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}
    np.testing.assert_array_equal(from_config(legacy).frequencies, from_config(config_of("linear")).frequencies)
    assert from_config({**old, "kv_channels": 64}).pairs == 32
    for names in ({"rotary_pct": 0.25}, {"rotary_dim": 32}, {"partial_rotary_factor": 0.25}):
        assert from_config({**old, **names}).pairs == 16
    yarn = {"rope_type": "yarn", "rope_theta": 1e6}
    by_length = {"head_dim": 128, "max_position_embeddings": 4096, "original_max_position_embeddings": 1024}
    found = from_config({**by_length, "rope_parameters": yarn}).frequencies
    np.testing.assert_array_equal(found, from_config(config_of("yarn")).frequencies)


@pytest.mark.parametrize("kind", ["deepseek_yarn", "deepseek_llama_scaling"])
def test_keys_with_mla_move_behind_their_latent(kind: str) -> None:
    """In vLLM models with MLA have a YaRN of their own."""
    from vllm.model_executor.layers.rotary_embedding import get_rope

    parameters = {**PARAMETERS["yarn"], "rope_type": kind, "factor": 4.0, "beta_fast": 24, "mscale": 0.7}
    module = get_rope(64, LONGEST, False, parameters, torch.float32)
    rope = from_config(config_of("yarn", kv_lora_rank=512, qk_rope_head_dim=64, rope_parameters=parameters))
    with torch.no_grad():
        np.testing.assert_allclose(rope.frequencies, module._compute_inv_freq(4.0).numpy(), rtol=5e-7)

    raw = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    latent = torch.randn(16, 512, generator=torch.Generator().manual_seed(3))
    at = {
        p: module.forward_native(torch.arange(p, p + 16), torch.zeros(16, 1, 64), raw[:, None])[1][:, 0]
        for p in (7, 3000)
    }
    g = vllm_cache("LBHNC", layers=1, blocks=1, heads=1, block_tokens=16, parts=(576,), dtype="float32")
    cache = Cache.empty(g)
    rows = cache.data.view(torch.float32).view(16, 576)
    rows[:] = torch.cat([latent, at[7]], dim=1)
    rotate_keys(cache, np.array([[0, 0, 16]], dtype=np.int32), 2993, rope)
    assert torch.equal(rows[:, :512], latent)
    assert ((rows[:, 512:] - at[3000]).abs() <= 2.0**-11 * pair_lengths(at[3000], interleaved=True, dims=64)).all()


def test_what_looks_mixed_but_is_not_is_taken() -> None:
    for more in (
        {"no_rope_layers": [1, 1, 1], "no_rope_layer_interval": 4},
        {"layer_types": ["sliding_attention"] * 3, "sliding_window_pattern": 4},
        {"sliding_window_pattern": None, "rope_local_base_freq": None, "alibi": False, "use_mem_rope": True},
        {"position_embedding_type": "rope"},
    ):
        assert from_config(config_of("default", **more)).pairs == 64


def test_styles() -> None:
    assert not from_config(config_of("default", model_type="llama")).interleaved
    assert from_config(config_of("default", model_type="glm4")).interleaved
    assert from_config(config_of("default", model_type="llama"), interleaved=True).interleaved
    mla = from_config(config_of("yarn", kv_lora_rank=512, qk_rope_head_dim=64))
    assert (mla.interleaved, mla.first, mla.pairs) == (True, 512, 32)
    np.testing.assert_array_equal(mla.dims()[0][:2], [512, 514])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            config_of("default", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "dynamic NTK",
        ),
        (config_of("default", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "length of the sequence"),
        (config_of("default", rope_parameters=None, rope_scaling={"type": "su"}, rope_theta=1e4), "LongRoPE"),
        (config_of("default", rope_parameters={"rope_theta": 1e4, "mrope_section": [16, 24, 24]}), "M-RoPE"),
        (config_of("default", rope_parameters={"rope_type": "mrope", "rope_theta": 1e4}), "M-RoPE"),
        (config_of("default", rope_parameters={"rope_type": "ntk", "rope_theta": 1e4}), "'ntk': it is unknown"),
        (config_of("default", rope_parameters={"use_fope": True, "rope_theta": 1e4}), "Fourier"),
        (config_of("default", rope_parameters={"full_attention": {"rope_theta": 1e4}}), "differs by kind of layer"),
        (config_of("default", layer_types=["full_attention", "sliding_attention"]), "layers of several kinds"),
        (config_of("default", no_rope_layers=[1, 1, 0]), "some layers have no rotary embedding"),
        (config_of("default", no_rope_layers=[]), "no_rope_layers is empty"),
        (config_of("default", no_rope_layer_interval=4), "no_rope_layers is empty"),
        (config_of("default", use_rope_layers=[True, False]), r"use_rope_layers"),
        (config_of("default", sliding_window_pattern=6), "sliding_window_pattern"),
        (config_of("default", rope_local_base_freq=1e4), "rope_local_base_freq"),
        (config_of("default", swa_rope_theta=1e4), "swa_rope_theta"),
        (config_of("default", position_embedding_type="nope"), "position embedding is 'nope'"),
        (config_of("default", use_mem_rope=False), "no rotary embedding"),
        (config_of("default", mla_use_nope=True), "no rotary embedding"),
        (config_of("default", index_topk=2048), "indexer has keys of its own"),
        (config_of("default", text_config={"head_dim": 64}), "pass its text_config"),
        (config_of("default", model_type="hunyuan_v1_moe"), "norms keys with weights"),
        (config_of("default", dual_chunk_attention_config={"chunk_size": 8}), "dual chunk"),
        (config_of("default", rope_parameters={}), "no rope_theta"),
        (config_of("default", head_dim=None), "no head_dim"),
        (config_of("default", rotary_dim=129), "129 rotary dimensions of 128"),
        (config_of("default", rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "needs 'factor'"),
    ],
)
def test_what_cannot_be_re_positioned_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        from_config(config)
