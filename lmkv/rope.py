"""How a model turns its keys by their positions, and by how much to turn them further when they move. Pure.

Rotary embedding turns pair i of a key's dimensions by the angle position · frequency[i]. Turns add up, so a key
computed at p becomes the key at q when it is turned by (q − p) · frequency, whatever p is, as long as the frequencies
depend on nothing but the model. That holds for the kinds `default`, `linear`, `llama3` and `yarn`; the others are
refused.

YaRN also multiplies keys by an attention factor. It is in the cached key already and the same at every position; a turn
keeps it, so it is not needed here.

What is done to a key after its turn has to commute with turns, too. Where a model's code is known to do otherwise, or
not to turn some keys at all, the model is refused: a key turned by mistake is not found out by anything later on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import LayoutError
from .layout import Array

Floats = NDArray[np.float32]
Config = Mapping[str, Any]

INTERLEAVED_MODELS = frozenset({"cohere", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium"})
"""Model types whose pairs are neighbours, besides those with MLA. All others pair the halves."""
REASONS = {
    "dynamic": "its frequencies depend on the length of the sequence (dynamic NTK)",
    "longrope": "its frequencies depend on the length of the sequence (LongRoPE)",
    "su": "its frequencies depend on the length of the sequence (LongRoPE)",
    "mrope": "its positions are not one number a token (M-RoPE)",
}
"""Why known kinds are refused."""
_NORMED = "it norms keys with weights after it has turned them"
_PARTLY = "its layers of full attention have no rotary embedding"
MODEL_REASONS = {
    "cohere2": _PARTLY,
    "cohere2_moe": _PARTLY,
    "hunyuan_v1_dense": _NORMED,
    "hunyuan_v1_moe": _NORMED,
    "hunyuan_vl_text": _NORMED,
    "nanochat": "it turns keys the other way",
}
"""Why model types are refused, whatever else their configs say."""
LOCAL_ROTATIONS = ("rope_local_base_freq", "swa_rope_theta", "swa_rope_parameters")
"""Configs that have these turn keys of local attention in another way."""


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """The rotary embedding of a model's keys.

    Pair i is turned by frequencies[i] radians a token. `first` is the first dimension of a key that is turned. Of F
    pairs, pair i is (first + 2i, first + 2i + 1) where `interleaved` (GPT-J), else (first + i, first + F + i) (NeoX).
    """

    frequencies: Floats
    interleaved: bool = False
    first: int = 0

    @property
    def pairs(self) -> int:
        return len(self.frequencies)

    def dims(self) -> tuple[Array, Array]:
        """The two dimensions of every pair."""
        i = np.arange(self.pairs, dtype=np.int64)
        if self.interleaved:
            return self.first + 2 * i, self.first + 2 * i + 1
        return self.first + i, self.first + self.pairs + i

    def turns(self, offsets: ArrayLike) -> Floats:
        """(offsets, 2, pairs): cosine and sine of offset · frequency, the same numbers for every implementation.

        The angle is taken and reduced in double, where the product of a float32 frequency and an offset below 2^29 is
        exact, so that large offsets lose nothing.
        """
        angles = np.asarray(offsets, dtype=np.float64)[:, None] * self.frequencies.astype(np.float64)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def from_config(config: Config, *, interleaved: bool | None = None) -> Rope:
    """The rotary embedding of the text model that a Hugging Face config (as a dict) describes.

    Pass the config as loaded (`PretrainedConfig.to_dict()`): files leave out what the model's code fills in, such as
    the share of a head that is turned. `interleaved` overrides what is usual for the model type: a Llama from a GGUF
    file is interleaved, say. Raises LayoutError for what cannot be re-positioned, and why.
    """
    _require_one_rotation(config)
    parameters = _parameters(config)
    kind = str(parameters.get("rope_type", "default"))
    if kind not in _KINDS:
        reason = REASONS.get(kind, "it is unknown")
        raise LayoutError(
            f"keys cannot be re-positioned: rope type {kind!r}: {reason}", hint=f"known: {', '.join(_KINDS)}"
        )
    latent = int(config.get("kv_lora_rank") or 0)
    pairs_are_neighbours = bool(latent) or config.get("model_type") in INTERLEAVED_MODELS
    frequencies = _KINDS[kind](_rotary_dims(config, parameters, latent), parameters)
    return Rope(frequencies, pairs_are_neighbours if interleaved is None else interleaved, latent)


def _require_one_rotation(config: Config) -> None:
    """All layers turn all keys in the same way, and nothing undoes that."""
    if isinstance(config.get("text_config"), Mapping):
        raise LayoutError("the config is of several models, which may differ in rotation", hint="pass its text_config")
    if why := _unlike_layers(config) or _unlike_keys(config):
        raise LayoutError(f"keys cannot be re-positioned: {why}")


def _unlike_layers(config: Config) -> str:
    """Why some layers turn keys in another way than others, or may; empty when none does.

    Where a file leaves to the model's code which layers those are, they are not guessed.
    """
    kinds = set(config.get("layer_types") or ())
    if len(kinds) > 1:
        return f"layers of several kinds, {sorted(kinds)}, may differ in rotation"
    if not kinds and config.get("sliding_window_pattern"):
        return "layers of several kinds (sliding_window_pattern) may differ in rotation"
    if found := [name for name in LOCAL_ROTATIONS if config.get(name) is not None]:
        return f"layers of local attention have a rotation of their own ({found[0]})"
    for name in ("no_rope_layers", "use_rope_layers"):
        if any(not turned for turned in config.get(name) or ()):
            return f"some layers have no rotary embedding ({name})"
    if not config.get("no_rope_layers") and ("no_rope_layers" in config or config.get("no_rope_layer_interval")):
        return "some layers may have no rotary embedding (no_rope_layers is empty)"
    return ""


def _unlike_keys(config: Config) -> str:
    """Why keys are not what a turn by their position makes of them; empty when they are."""
    model = str(config.get("model_type"))
    if model in MODEL_REASONS:
        return f"model type {model!r}: {MODEL_REASONS[model]}"
    if config.get("position_embedding_type", "rope") not in ("rope", "rotary"):
        return f"its position embedding is {config['position_embedding_type']!r}, not rotary (position_embedding_type)"
    if config.get("alibi") or config.get("mla_use_nope") or not config.get("use_mem_rope", True):
        return "it has no rotary embedding (alibi, mla_use_nope or use_mem_rope)"
    if config.get("dual_chunk_attention_config"):
        return "dual chunk attention turns keys by their place in a chunk"
    if config.get("index_topk"):
        return "its indexer has keys of its own in another cache, which would have to move as well (index_topk)"
    return ""


def _parameters(config: Config) -> dict[str, Any]:
    """rope_parameters, or the older rope_scaling and rope_theta, with `rope_type` and `rope_theta`."""
    found = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if any(isinstance(value, Mapping) for value in found.values()):
        raise LayoutError(f"keys cannot be re-positioned: rotation differs by kind of layer: {sorted(found)}")
    if any(name in found or name in config for name in ("mrope_section", "xdrope_section")):
        raise LayoutError(f"keys cannot be re-positioned: {REASONS['mrope']}")
    if found.get("use_fope"):
        raise LayoutError("keys cannot be re-positioned: Fourier position embedding is not a turn")
    found.setdefault("rope_type", found.get("type", "default"))
    theta = _first_of(found, ("rope_theta",)) or _first_of(config, ("rope_theta", "rotary_emb_base"))
    if theta is None:
        raise LayoutError(
            "the config has no rope_theta", hint="pass the loaded model's config; older files leave it out"
        )
    found["rope_theta"] = float(theta)
    longest, trained = config.get("max_position_embeddings"), ("original_max_position_embeddings",)
    original = _first_of(config, trained) or _first_of(found, trained)
    if "factor" not in found and longest and original:
        found["factor"] = longest / original
    found["original_max_position_embeddings"] = original or longest
    return found


def _rotary_dims(config: Config, parameters: Config, latent: int) -> int:
    """Of a key, how many are turned."""
    heads = _first_of(config, ("num_attention_heads", "n_head"))
    hidden = _first_of(config, ("hidden_size", "n_embd"))
    head_dim = _first_of(config, ("head_dim", "attention_head_dim", "kv_channels"))
    head_dim = head_dim or (hidden and heads and hidden // heads)
    if latent:
        head_dim = config.get("qk_rope_head_dim")
    if not head_dim:
        raise LayoutError("the config has no head_dim, and no hidden_size and num_attention_heads to tell it from")
    names = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
    share = 1.0 if latent else _first_of(parameters, names) or _first_of(config, names) or 1.0
    dims = int(config.get("rotary_dim") or head_dim * share)
    if dims < 2 or dims % 2 or dims > head_dim:
        raise LayoutError(f"{dims} rotary dimensions of {head_dim} are not pairs within a head")
    return dims


def _first_of(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _need(parameters: Config, name: str) -> float:
    if parameters.get(name) is None:
        raise LayoutError(f"rope type {parameters['rope_type']!r} needs {name!r}; the config has {sorted(parameters)}")
    return float(parameters[name])


# Engines compute frequencies in float32; each step below is rounded as theirs is, so that turns fit their keys.


def _wavelengths(dims: int, theta: float) -> Floats:
    """Tokens a radian."""
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return np.power(float(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)


def _default(dims: int, parameters: Config) -> Floats:
    return np.float32(1) / _wavelengths(dims, parameters["rope_theta"])


def _linear(dims: int, parameters: Config) -> Floats:
    return _default(dims, parameters) / np.float32(_need(parameters, "factor"))


def _llama3(dims: int, parameters: Config) -> Floats:
    """Slow pairs are slowed down by the factor, fast ones are not, and between them it is blended."""
    plain = _default(dims, parameters)
    factor, original = _need(parameters, "factor"), _need(parameters, "original_max_position_embeddings")
    low, high = _need(parameters, "low_freq_factor"), _need(parameters, "high_freq_factor")
    periods = np.float32(original) / (np.float32(2 * math.pi) / plain)
    smooth = (periods - np.float32(low)) / np.float32(high - low) if high != low else np.zeros_like(plain)
    blended = (1 - smooth) * plain / np.float32(factor) + smooth * plain
    slow = np.where(periods < np.float32(low), plain / np.float32(factor), blended)
    return np.asarray(np.where(periods > np.float32(high), plain, slow), dtype=np.float32)


def _yarn(dims: int, parameters: Config) -> Floats:
    """Pairs that turn often within the original length keep their frequency, those that do not are slowed down."""
    lengths = _wavelengths(dims, parameters["rope_theta"])
    factor, original = _need(parameters, "factor"), _need(parameters, "original_max_position_embeddings")

    def pair_of(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(parameters["rope_theta"]))

    low, high = pair_of(parameters.get("beta_fast") or 32), pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001  # as engines have it, against a division by zero
    ramp = np.clip((np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = 1 - ramp
    slowed = np.float32(1) / (np.float32(factor) * lengths)
    return np.asarray(slowed * (1 - kept) + np.float32(1) / lengths * kept, dtype=np.float32)


_KINDS: dict[str, Callable[[int, Config], Floats]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "deepseek_yarn": _yarn,  # vLLM's names for it in models with MLA
    "deepseek_llama_scaling": _yarn,
}
