"""Keys of whole models, computed at one position and moved to another, against transformers' models.

What a config says of rotation is only half of it: pairing, direction and what comes after a turn are in a model's code.
Attention sees differences of positions alone, so the keys of all layers have to move, not only the first one's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lmkv.errors import LayoutError
from lmkv.kernels import Cache, rotate_keys
from lmkv.layout import vllm_cache
from lmkv.rope import Rope, from_config

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_channels": 32,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "num_local_experts": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS, TOKENS, FIRST, LATER = 3, 16, 3, 700

MOVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "cohere": {},
    "ernie4_5": {},
    "falcon": {"alibi": False},
    "glm4": {},
    "gpt_neox": {},
    "granitemoehybrid": {"layer_types": ["attention"] * LAYERS, "position_embedding_type": "rope"},
    "helium": {},
    "jetmoe": {},
    "phi": {},
    "smollm3": {"no_rope_layers": [1] * LAYERS},
    "stablelm": {},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cohere2": ({"layer_types": ["full_attention"] * LAYERS}, "full attention have no rotary embedding"),
    "falcon": ({"alibi": True}, "no rotary embedding"),
    "granitemoehybrid": ({"layer_types": ["attention"] * LAYERS}, "position embedding is None"),
    "hunyuan_v1_dense": ({}, "norms keys with weights after"),
    "nanochat": ({}, "turns keys the other way"),
    "smollm3": ({"no_rope_layers": [1, 1, 0]}, "some layers have no rotary embedding"),
}
"""By model type: what is set besides SIZES, and why it is refused."""


@pytest.fixture(scope="module", autouse=True)
def transformers() -> Iterator[Any]:
    """Importing models warns of what they use, and some configs of token ids."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers")
        level = found.logging.get_verbosity()
        found.logging.set_verbosity(logging.ERROR)
        yield found
        found.logging.set_verbosity(level)


def config_of(transformers: Any, kind: str, changes: dict[str, Any]) -> Any:
    known = transformers.CONFIG_MAPPING[kind]().to_dict()
    return transformers.CONFIG_MAPPING[kind](**{k: v for k, v in SIZES.items() if k in known}, **changes)


def model_of(transformers: Any, config: Any) -> Any:
    """Random, norms' weights too: if all were 1, a norm after the turn would not be noticed."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and weight.dim() == 1:
                weight.copy_(1 + 0.5 * torch.randn_like(weight))
    return model


def keys_at(model: Any, first: int) -> torch.Tensor:
    """(layers, heads, tokens, head_dim) of the same prompt, from this position on."""
    tokens = torch.arange(5, 5 + TOKENS)[None]
    positions = torch.arange(first, first + TOKENS)[None]
    with torch.inference_mode():
        cache = model(input_ids=tokens, position_ids=positions, use_cache=True).past_key_values
    return torch.cat([layer.keys for layer in cache.layers])


def moved(keys: torch.Tensor, offset: int, rope: Rope) -> torch.Tensor:
    layers, heads, tokens, dims = keys.shape
    g = vllm_cache(
        "LBHNC", layers=layers, blocks=1, heads=heads, block_tokens=tokens, parts=(dims, dims), dtype="float32"
    )
    cache = Cache.empty(g)
    table = cache.data.view(torch.float32).view(layers, heads, tokens, 2, dims)
    table[:, :, :, 0] = keys
    rotate_keys(cache, np.array([[0, 0, tokens]], dtype=np.int32), offset, rope)
    return table[:, :, :, 0]


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the layer that is furthest off, relative to its keys."""
    return float(((got - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).max())


@pytest.mark.parametrize("kind", MOVED)
def test_a_model_s_keys_move(transformers: Any, kind: str) -> None:
    """Angles in the model are float32: off by up to 2^-15 radians at positions below 2^10. A wrong turn is off by 1."""
    config = config_of(transformers, kind, MOVED[kind])
    rope = from_config(config.to_dict())
    model = model_of(transformers, config)
    keys, wanted = keys_at(model, FIRST), keys_at(model, LATER)
    assert keys.shape[0] == LAYERS
    assert distance(keys, wanted) > 0.1
    assert distance(moved(keys, LATER - FIRST, rope), wanted) < 1e-4


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_whose_keys_would_not_move_is_refused(transformers: Any, kind: str) -> None:
    """And rightly so: turned as a plain model's, its keys are not what it computes there."""
    changes, reason = REFUSED[kind]
    config = config_of(transformers, kind, changes)
    with pytest.raises(LayoutError, match=reason):
        from_config(config.to_dict())
    names = ("rope_parameters", "hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")
    plain = {name: value for name, value in config.to_dict().items() if name in names}
    model = model_of(transformers, config)
    keys, wanted = keys_at(model, FIRST), keys_at(model, LATER)
    for interleaved in (False, True):
        rope = from_config(plain, interleaved=interleaved)
        assert distance(moved(keys, LATER - FIRST, rope), wanted) > 0.1
